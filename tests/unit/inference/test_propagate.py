"""Test the frozen rows of `propagate` against an independent implementation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import sample
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.models import (
    random_tensors,
    random_tokens,
    split_qkv,
    tiny_config,
    tiny_model,
)

TOKENS = random_tokens(24)


class _Recurrence:
    """`propagate` for llama, one token at a time, with heads of an optional block and a norm.

    It follows the definition and uses only the tensors of the model.
    """

    def __init__(self, config: Config, tensors: dict[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.cache: dict[
            str, list[tuple[Tensor, Tensor]]
        ] = {}  # keys and values of each attention by name

    def step(
        self, token: int, exits_at: Callable[[int, Tensor], bool]
    ) -> tuple[int, dict[int, Tensor]]:
        """Return the exit of the newest token, and the logits [v] of each exit up to it."""
        self.position = len(self.cache.get("layers.1", []))
        model, head = self.config.model, self.config.exits.head
        x, exited, logits = self.tensors["embedding.word.weight"][token], 0, {}
        for layer in range(1, model.num_layers + 1):
            x = x if exited else self._layer(f"layers.{layer}", x)
            if exited:
                self._remember(f"layers.{layer}", x)
            if layer in self.config.exits.boundaries and "block" in head:
                block = f"exits.{layer}.block"
                hidden = x if exited else self._layer(block, x)
                if exited:
                    self._remember(block, x)
            else:
                hidden = x
            if not exited and layer in (*self.config.exits.boundaries, model.num_layers):
                normed = self._norm(f"exits.{layer}.norm", hidden)
                logits[layer] = self.tensors[output_weight_name(self.config, layer)] @ normed
                exited = layer if exits_at(layer, logits[layer]) else 0
        return exited or model.num_layers, logits

    def _layer(self, name: str, x: Tensor) -> Tensor:
        model = self.config.model
        queries = self._remember(name, x)
        mixed = []
        for head, query in enumerate(queries):
            group = head // (model.num_heads // model.num_kv_heads)
            keys = torch.stack([k[group] for k, _ in self.cache[name]])
            values = torch.stack([v[group] for _, v in self.cache[name]])
            mixed.append((keys @ query / model.head_dim**0.5).softmax(dim=0) @ values)
        x = x + self.tensors[f"{name}.self_attention.linear_proj.weight"] @ torch.cat(mixed)
        normed = self._norm(f"{name}.pre_mlp_layernorm", x)
        gate, up = (self.tensors[f"{name}.mlp.linear_fc1.weight"] @ normed).chunk(2)
        inner = gate * gate.sigmoid() * up
        return x + self.tensors[f"{name}.mlp.linear_fc2.weight"] @ inner

    def _remember(self, name: str, x: Tensor) -> list[Tensor]:
        """Keep the keys and values of this position, and return its queries by head."""
        weight = self.tensors[f"{name}.self_attention.linear_qkv.weight"]
        normed = self._norm(f"{name}.input_layernorm", x)
        q, k, v = (part @ normed for part in split_qkv(self.config, weight))
        size = self.config.model.head_dim
        keys = torch.stack([self._turned(part) for part in k.split(size)])
        self.cache.setdefault(name, []).append((keys, torch.stack(v.split(size))))
        return [self._turned(part) for part in q.split(size)]

    def _turned(self, x: Tensor) -> Tensor:
        model, half = self.config.model, len(x) // 2
        exponent = torch.arange(half, dtype=torch.float32) * 2 / model.head_dim
        angle = (1.0 / model.rope_theta**exponent).double() * self.position
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean() + self.config.model.norm_eps).rsqrt()
        return x * scale * self.tensors[f"{name}.weight"]


@pytest.mark.parametrize("head", [("norm",), ("block", "norm")])
@torch.no_grad()
def test_frozen_rows_equal_the_recurrence(head: tuple[str, ...]) -> None:
    """One forward with given exits has the same logits at all evaluated exits as single steps."""
    config, tokens = tiny_config(head=head), TOKENS
    tensors = random_tensors(config)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.tensor([1, 2, 4])[torch.randint(3, (24,), generator=generator)].tolist()
    exited_at = [4] * 4 + chosen[4:]
    recurrence, parts = _Recurrence(config, tensors), []
    for position, token in enumerate(tokens.tolist()):
        exited, logits = recurrence.step(token, lambda exit, _, at=position: exit == exited_at[at])
        assert exited == exited_at[position]
        parts.append(logits)
    model = ReferenceModel(config, tensors, torch.float64)
    found = {b: model.logits(b, hidden) for b, hidden in model.walk(tokens, exited_at)}
    exact = model.forward(tokens)
    largest = 0.0
    for position, (exited, logits) in enumerate(zip(exited_at, parts, strict=True)):
        assert list(logits) == [b for b in (1, 2, 4) if b <= exited]
        for boundary, expected in logits.items():
            row = found[boundary][position]
            torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-9)
            largest = max(largest, float((exact[boundary][position] - row).abs().max()))
    assert largest > 0.1  # freezing has an effect


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=0.8, min_p=0.02, seed=5)]
)
@pytest.mark.parametrize("head", [("norm",), ("block", "norm")])
@torch.no_grad()
def test_propagate_equals_the_recurrence(head: tuple[str, ...], sampling: SamplingParams) -> None:
    """Confidences, compared to 1e-9, show errors that tokens of a small model may not."""
    config = tiny_config(head=head)
    tensors = random_tensors(config)
    model = ReferenceModel(config, tensors, torch.float64)
    probabilities = {b: x.softmax(dim=-1).amax(dim=-1) for b, x in model.forward(TOKENS).items()}
    policy = make_exit_policy((1, 2), [float(probabilities[b].median()) for b in (1, 2)])
    made, exact = (
        generate_reference(
            model, TOKENS[:5].tolist(), policy, replace(sampling, max_tokens=20), strategy
        )
        for strategy in ("propagate", "exact")
    )
    recurrence = _Recurrence(config, tensors)
    sequence = [*made.prompt_token_ids, *made.token_ids]

    def exits_at(boundary: int, logits: Tensor) -> bool:
        return boundary == 4 or policy.exits(boundary, float(policy.confidence(logits)))

    for token in made.prompt_token_ids[:-1]:
        recurrence.step(token, lambda boundary, _: boundary == 4)
    for index, token in enumerate(made.token_ids):
        position = len(made.prompt_token_ids) - 1 + index
        exited, logits = recurrence.step(sequence[position], exits_at)
        assert made.exits[index] == exited
        confidence = float(policy.confidence(logits[exited]))
        assert made.confidences[index] == pytest.approx(confidence, abs=1e-9)
        assert token == sample(logits[exited], sampling, position)
    assert set(made.exits) == {1, 2, 4}, "the test needs tokens at every exit"
    assert made.confidences != pytest.approx(exact.confidences, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt"])
@torch.no_grad()
def test_a_frozen_row_affects_later_rows_only_in_deeper_layers(family: str) -> None:
    model = tiny_model(tiny_config(family, (1, 2, 3), head=("block", "mlp", "norm")))
    tokens, never = random_tokens(12), torch.full((12,), 4)
    live = dict(model.walk(tokens))
    for boundary, hidden in model.walk(tokens, never):
        assert torch.equal(hidden, live[boundary])
    frozen = never.clone()
    frozen[5] = 2
    for boundary, hidden in model.walk(tokens, frozen):
        same = (hidden == live[boundary]).all(dim=1).tolist()
        assert same == [boundary <= 2 or row < 5 for row in range(12)]


def test_invalid_exits_of_frozen_rows_are_refused() -> None:
    model, tokens = tiny_model(), random_tokens(3)
    for exited_at, message in (
        ([4, 4], r"exited_at has shape \[2\]\. Pass one boundary for each of the 3 tokens"),
        ([4, 0, 4], r"boundaries 0 to 4\. Pass boundaries from 1 to 4"),
        ([4, 5, 4], r"boundaries 4 to 5\. Pass boundaries from 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            next(model.walk(tokens, exited_at))
