"""A stage with an entire model compared with a plain PyTorch model, written from the formulas.

Shapes: s sequence, b microbatch, h hidden, d head dimension, g key and value heads, v vocabulary.
"""

import math

import pytest
import torch

from ee_llm import distributed
from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.config import Config, load_config
from ee_llm.losses.exit_losses import exit_loss
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from ee_llm.model.stage import Stage

VOCAB, LENGTH, BATCH = 40, 9, 3
WEIGHTS = {1: 0.4, 2: 0.7, 4: 1.0}

HEADS = [
    ("norm",),
    ("mlp", "norm"),
    ("block", "norm"),
    ("block", "mlp", "norm"),
    ("block", "mlp"),
    ("mlp",),
    (),
    ("translator", "norm"),
    ("block", "mlp", "translator", "norm"),
]
# Over 30 positions the four pairs rotate 4.8, 1.5, 0.5 and 0.15 times: all cases of llama3.
LLAMA3 = {
    "model.head_dim": 8,
    "model.rope_theta": 100.0,
    "model.rope_scaling": "llama3",
    "model.rope_factor": 8.0,
    "model.rope_low_freq_factor": 0.4,
    "model.rope_high_freq_factor": 2.0,
    "model.rope_original_length": 30,
}
VARIANTS = {
    f"{family} {'+'.join(head) or 'bare'}": {"model.family": family, "exits.head": head}
    for family in ("llama", "gpt")
    for head in HEADS
} | {
    "llama tied exits": {"exits.output": "tied"},
    "llama shared, tied final exit": {"exits.output": "shared", "model.tie_embeddings": True},
    "gpt tied everywhere": {
        "model.family": "gpt",
        "exits.output": "tied",
        "model.tie_embeddings": True,
    },
    "gpt own, rope, resets": {
        "model.family": "gpt",
        "model.position": "rope",
        "exits.output": "own",
        "exits.head": ("block", "mlp", "norm"),
        "data.reset_positions": True,
    },
    "gpt learned, resets": {"model.family": "gpt", "data.reset_positions": True},
    "llama learned": {"model.position": "learned"},
    "llama resets": {"data.reset_positions": True, "model.rope_theta": 100.0},
    "llama multi-query": {"model.num_kv_heads": 1, "model.head_dim": 6},
    "llama without grouped queries": {"model.num_kv_heads": 4, "exits.output": "own"},
    "llama temperatures": {"exits.temperatures": (2.0, 0.5), "exits.output": "own"},
    "llama dynamic token weights": {
        "exits.dynamic_token_weights": True,
        "exits.temperatures": (1.5, 0.8),
    },
    "llama qkv biases, blocks": {
        "model.qkv_bias": True,
        "exits.head": ("block", "norm"),
    },
    "llama qk norms, mlp": {"model.qk_norm": True, "exits.head": ("mlp", "norm")},
    "llama qk norms, learned": {"model.qk_norm": True, "model.position": "learned"},
    "llama llama3 scaling": LLAMA3 | {"model.qkv_bias": True, "model.qk_norm": True},
    "llama linear scaling": {"model.rope_scaling": "linear", "model.rope_factor": 2.5},
    "gpt tanh gelu": {"model.family": "gpt", "model.gelu": "tanh", "exits.head": ("mlp",)},
    "gpt dynamic token weights, mlp": {
        "model.family": "gpt",
        "exits.dynamic_token_weights": True,
        "exits.head": ("mlp", "norm"),
    },
}


def make_config(variant: dict) -> Config:
    sizes = {
        "model.num_layers": 4,
        "model.hidden_size": 16,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 20,
        "model.vocab_size": VOCAB,
        "model.max_seq_length": LENGTH,
        "exits.boundaries": (1, 2),
    }
    return load_config(None, sizes | variant)


class Plain:
    """The formulas of the model on a dictionary of parameters, without torch.nn."""

    def __init__(self, config: Config, parameters: dict[str, torch.Tensor]) -> None:
        self.config, self.p = config, parameters
        self.llama = config.model.family == "llama"

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        eps = self.config.model.norm_eps
        if self.llama:
            return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.p[f"{name}.weight"]
        x = x - x.mean(-1, keepdim=True)
        scaled = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("...i,oi->...o", x, self.p[f"{name}.weight"])
        has_bias = self.config.model.qkv_bias if name.endswith("_qkv") else not self.llama
        return y + self.p[f"{name}.bias"] if has_bias else y

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate the pairs (i, i + d/2) of x [b, s, heads, d] by position * theta^(-2i/d)."""
        if self.config.model.position != "rope":
            return x
        half = x.shape[-1] // 2
        exponents = torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1]
        # float32 in every precision, as in Llama checkpoints.
        frequencies = (1.0 / self.config.model.rope_theta**exponents).double()
        if self.config.model.rope_scaling != "none":
            # Exact to the last bit of float32; other tests compare it with other implementations.
            frequencies = inverse_frequencies(self.config.model).double()
        angles = positions.double()[:, :, None, None] * frequencies
        low, high = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def attention(self, name: str, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        model = self.config.model
        d, g = model.head_dim, model.num_kv_heads
        per_group = model.num_heads // g
        qkv = self.linear(f"{name}.linear_qkv", x).unflatten(-1, (g, per_group + 2, d))
        q, k = qkv[..., :per_group, :].flatten(2, 3), qkv[..., per_group, :]
        if model.qk_norm:
            q, k = self.norm(f"{name}.q_layernorm", q), self.norm(f"{name}.k_layernorm", k)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        v = qkv[..., per_group + 1, :]
        outputs = []
        for head in range(model.num_heads):
            keys, values = k[:, :, head // per_group], v[:, :, head // per_group]
            scores = torch.einsum("bid,bjd->bij", q[:, :, head], keys) / math.sqrt(d)
            future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            scores = scores.masked_fill(future, -math.inf)
            outputs.append(torch.einsum("bij,bjd->bid", scores.softmax(-1), values))
        return self.linear(f"{name}.linear_proj", torch.cat(outputs, dim=-1))

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        inner = self.linear(f"{name}.linear_fc1", x)
        if self.llama:
            gate, up = inner.chunk(2, dim=-1)
            inner = gate / (1 + (-gate).exp()) * up
        else:
            inner = inner * (1 + self.sigmoid_like(inner)) / 2
        return self.linear(f"{name}.linear_fc2", inner)

    def sigmoid_like(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.model.gelu == "erf":
            return torch.erf(x / math.sqrt(2))
        return torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    def layer(self, name: str, x: torch.Tensor, positions: torch.Tensor):
        """Return the residual stream after attention, and after the layer."""
        normed = self.norm(f"{name}.input_layernorm", x)
        attended = x + self.attention(f"{name}.self_attention", normed, positions)
        mlp = self.mlp(f"{name}.mlp", self.norm(f"{name}.pre_mlp_layernorm", attended))
        return attended, attended + mlp

    def output_weight(self, boundary: int) -> torch.Tensor:
        final = "embedding.word.weight" if self.config.model.tie_embeddings else "output.weight"
        if boundary == self.config.model.num_layers:
            return self.p[final]
        own = f"exits.{boundary}.output.weight"
        table = {"tied": "embedding.word.weight", "shared": final, "own": own}
        return self.p[table[self.config.exits.output]]

    def logits(
        self, boundary: int, attended: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        exits = self.config.exits
        name, x, temperature, head = f"exits.{boundary}", hidden, 1.0, ("norm",)
        if boundary in exits.boundaries:
            head = exits.head
            temperature = exits.temperatures[exits.boundaries.index(boundary)]
        if "block" in head:
            _, x = self.layer(f"{name}.block", x, positions)
        elif "mlp" in head:
            x = attended
        if "mlp" in head:
            x = x + self.mlp(f"{name}.mlp", self.norm(f"{name}.mlp_norm", x))
        if "translator" in head:
            x = x / (x.square().mean(-1, keepdim=True) + self.config.model.norm_eps).sqrt()
            x = x @ self.p[f"{name}.translator.weight"].T + self.p[f"{name}.translator.bias"]
        if "norm" in head:
            x = self.norm(f"{name}.norm", x)
        return x @ self.output_weight(boundary).T / temperature

    def losses(self, tokens, labels, mask, positions) -> dict[int, tuple[torch.Tensor, ...]]:
        """Return (objective, reported) sums of losses over valid tokens by boundary."""
        x = self.p["embedding.word.weight"][tokens]
        if self.config.model.position == "learned":
            x = x + self.p["embedding.position.weight"][positions]
        losses = {}
        for number in range(1, self.config.model.num_layers + 1):
            attended, x = self.layer(f"layers.{number}", x, positions)
            if number not in WEIGHTS:
                continue
            logits = self.logits(number, attended, x, positions)
            one_hot = torch.eye(VOCAB, dtype=torch.float64)[labels]
            token_loss = logits.exp().sum(-1).log() - (logits * one_hot).sum(-1)
            objective = token_loss
            if self.config.exits.dynamic_token_weights and number in self.config.exits.boundaries:
                objective = token_loss * logits.softmax(-1).amax(-1).detach()
            losses[number] = (objective * mask).sum(), (token_loss * mask).sum()
        return losses


def make_batch(config: Config) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < 0.7).float()
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    if config.data.reset_positions:
        positions[0, 4:] -= 4
        positions[2, 7:] -= 7
    return tokens[:, :-1], tokens[:, 1:], mask, positions


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def errors(variant: dict, recompute: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return relative errors of losses and gradients, and the maximum of each gradient."""
    config = make_config(variant | {"training.recompute": recompute})
    distributed.initialize(timeout_s=20)
    stage = Stage(config, 0, torch.float64)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():  # Avoid norms of 1 and biases of 0.
        for parameter in stage.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    tokens, labels, mask, positions = make_batch(config)

    copies = {n: p.detach().clone().requires_grad_() for n, p in stage.named_parameters()}
    expected = Plain(config, copies).losses(tokens, labels, mask, positions)
    sum(WEIGHTS[b] * objective for b, (objective, _) in expected.items()).backward()

    _, taps = stage(tokens, positions)
    assert stage.boundaries == tuple(WEIGHTS)
    relative, total = {}, 0.0
    for boundary, tap in zip(stage.boundaries, taps, strict=True):
        is_early = boundary != config.model.num_layers
        loss = exit_loss(
            stage.exit_logits(boundary, tap, positions),
            labels.t(),
            mask.t(),
            dynamic_token_weights=config.exits.dynamic_token_weights and is_early,
        )
        total = total + WEIGHTS[boundary] * loss.objective
        for kind, actual, plain in zip(loss._fields, loss, expected[boundary], strict=True):
            relative[f"{kind} {boundary}"] = relative_error(actual.detach(), plain.detach())
    total.backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        relative[name] = relative_error(parameter.grad, copies[name].grad)
    return relative, {name: copy.grad.abs().max().item() for name, copy in copies.items()}


def check(variant: dict, recompute: str = "none") -> None:
    [(relative, sizes)] = run_ranks(1, errors, variant, recompute)
    assert min(sizes.values()) > 1e-6, "a gradient is too small for a meaningful test"
    too_large = {name: error for name, error in relative.items() if not error < 1e-9}
    assert not too_large


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_plain_model(variant):
    check(VARIANTS[variant])


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_recomputation_gives_the_same_results(family, recompute):
    check({"model.family": family, "exits.head": ("mlp", "norm")}, recompute)


def _failing_layer():
    config = make_config({"exits.head": ("mlp", "norm")})
    distributed.initialize(timeout_s=20)
    stage = Stage(config, 0, torch.float64)
    layer = stage.layers["1"]

    def fail(*_, **__):
        raise FloatingPointError

    tokens, _, _, positions = make_batch(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.mlp, "forward", fail)
        with pytest.raises(FloatingPointError):
            stage(tokens, positions)
    return len(layer.pre_mlp_layernorm._forward_pre_hooks)


def test_failing_layer_removes_its_tap():
    """A remaining hook would keep activations in memory and tap every later forward pass."""
    assert run_ranks(1, _failing_layer) == [0]
