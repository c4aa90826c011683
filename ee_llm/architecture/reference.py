"""A reference implementation of the early-exit model in plain PyTorch.

It computes the hidden states of every exit for one teacher-forced sequence, without a cache, a
batch or parallel ranks. Tests and certificates compare the faster implementations with it.

Legend of shapes: s sequence, h hidden, v vocabulary, n heads, d head dimension.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.architecture.gates import Gate
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.architecture.tensor_parallel import group_qkv
from ee_llm.architecture.tensors import take_tensors
from ee_llm.config import Config
from ee_llm.errors import UserError

_APPROXIMATE = {"erf": "none", "tanh": "tanh"}  # the argument of torch's gelu


class ReferenceModel:
    """A Llama- or GPT-style model with exits, built from a configuration and its tensors by name.

    Attributes:
        config: The configuration of the model.
        num_layers: The number of layers.
        boundaries: The boundaries of all exits, from shallow to deep; the last is the final exit's.
        dtype, device: The dtype and the device of the computation.

    Raises UserError if the tensors do not fit the configuration.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.num_layers = config.model.num_layers
        self.boundaries = (*config.exits.boundaries, self.num_layers)
        self.dtype = dtype
        self.device = torch.device(device)
        self._tensors = dict(take_tensors(config, tensors, dtype, device))
        temperatures = (*config.exits.temperatures, 1.0)
        self._temperature = dict(zip(self.boundaries, temperatures, strict=True))

    def walk(
        self, tokens: Tensor, exited_at: Sequence[int] | Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (boundary, hidden [s, h]) of every exit, from shallow to deep.

        Layers run as the iterator advances: stopping at an exit saves the layers behind it.

        Args:
            tokens: Token ids [s], int64.
            exited_at: The boundary [s] at which the residual stream of each row is frozen
                (num_layers: never). Deeper layers compute the row's keys and values from the frozen
                stream and add nothing to it (state propagation of CALM, arXiv 2207.07061), so the
                row's `hidden` of deeper exits is meaningless. None freezes no row.

        Yields:
            The boundary of the exit, and the input of its output weight (see `logits`).

        Raises:
            UserError: There are no tokens or more than `model.max_seq_length`, a token is outside
                the vocabulary, or `exited_at` has a wrong length or an impossible boundary.
        """
        for boundary, x, attended in self.residuals(tokens, exited_at):
            if boundary in self._temperature:
                yield boundary, self._head(boundary, x, attended)

    def residuals(
        self, tokens: Tensor, exited_at: Sequence[int] | Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (boundary, residual stream [s, h], the same before the layer's MLP) from 0 on.

        Boundary 0 is the embedding output. The arguments and errors are those of `walk`.
        """
        self._check(tokens)
        frozen_at = self._frozen_at(exited_at, len(tokens))
        x = self._embed(tokens.to(self.device))
        yield 0, x, x
        for layer in range(1, self.num_layers + 1):
            name = f"layers.{layer}"
            live = (frozen_at >= layer)[:, None]
            attended = x + self._attention(name, x)
            x = torch.where(live, attended + self._mlp(name, "pre_mlp_layernorm", attended), x)
            yield layer, x, attended

    def head_input(self, boundary: int, x: Tensor, attended: Tensor) -> Tensor:
        """Return the input [s, h] of the output weight of the exit at `boundary`.

        Args:
            boundary: Boundary of the exit.
            x: Residual stream [s, h], as `residuals` yields it.
            attended: The same before the layer's MLP; the final exit does not read it.
        """
        return self._head(boundary, x, attended)

    def logits(self, boundary: int, hidden: Tensor) -> Tensor:
        """Return the logits [..., v] of the exit at `boundary` for its hidden states [..., h]."""
        weight = self._tensors[output_weight_name(self.config, boundary)]
        return F.linear(hidden, weight) / self._temperature[boundary]

    def gate(self, boundary: int, x: Tensor) -> Tensor:
        """Return the confidence [r] of the gate of an exit, which the tensors must include.

        x: rows [r, h] of the residual stream at the boundary.
        """
        return Gate(self._tensors, boundary, self.config.model.norm_eps)(x)

    def forward(self, tokens: Tensor) -> dict[int, Tensor]:
        """Return {boundary: logits [s, v]} of every exit for int64 tokens [s]."""
        return {boundary: self.logits(boundary, hidden) for boundary, hidden in self.walk(tokens)}

    def _check(self, tokens: Tensor) -> None:
        model = self.config.model
        if tokens.dim() != 1 or len(tokens) == 0:
            raise UserError(
                f"tokens has shape {list(tokens.shape)}. Pass a tensor of shape [s], s at least 1."
            )
        if len(tokens) > model.max_seq_length:
            raise UserError(
                f"{len(tokens)} tokens are more than model.max_seq_length = {model.max_seq_length}."
                " Shorten the prompt."
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= model.vocab_size:
            raise UserError(
                f"token ids {int(tokens.min())} to {int(tokens.max())} exceed model.vocab_size ="
                f" {model.vocab_size}. Use the tokenizer with which the model was trained."
            )

    def _frozen_at(self, exited_at: Sequence[int] | Tensor | None, length: int) -> Tensor:
        if exited_at is None:
            exited_at = [self.num_layers] * length
        frozen_at = torch.as_tensor(exited_at, device=self.device)
        if frozen_at.shape != (length,):
            raise UserError(
                f"exited_at has shape {list(frozen_at.shape)}. Pass one boundary for each of the"
                f" {length} tokens."
            )
        if int(frozen_at.min()) < 1 or int(frozen_at.max()) > self.num_layers:
            raise UserError(
                f"exited_at has boundaries {int(frozen_at.min())} to {int(frozen_at.max())}. Pass"
                f" boundaries from 1 to {self.num_layers}."
            )
        return frozen_at

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self._tensors["embedding.word.weight"][tokens]
        if self.config.model.position == "learned":
            x = x + self._tensors["embedding.position.weight"][: len(tokens)]
        return x

    def _head(self, boundary: int, x: Tensor, attended: Tensor) -> Tensor:
        """Return the input of an exit's output weight.

        It is [block] -> [mlp] -> [translator] -> [norm] of x [s, h]. Without a block, the mlp reads
        the layer's residual stream after attention, `attended`, and replaces the layer's own MLP
        (EE-Tuning, arXiv 2402.00518).
        """
        name = f"exits.{boundary}"
        parts = ("norm",) if boundary == self.num_layers else self.config.exits.head
        if "block" in parts:
            block = f"{name}.block"
            x = x + self._attention(block, x)
            x = attended = x + self._mlp(block, "pre_mlp_layernorm", x)
        if "mlp" in parts:
            x = attended + self._mlp(name, "mlp_norm", attended)
        if "translator" in parts:
            x = F.rms_norm(x, (x.shape[-1],), eps=self.config.model.norm_eps)
            x = self._linear(f"{name}.translator", x)
        return self._norm(f"{name}.norm", x) if "norm" in parts else x

    def _attention(self, layer: str, x: Tensor) -> Tensor:
        model = self.config.model
        q_per_group = model.num_heads // model.num_kv_heads
        normed = self._norm(f"{layer}.input_layernorm", x)
        fused = self._linear(f"{layer}.self_attention.linear_qkv", normed)
        qkv = group_qkv(model, fused, dim=1)
        q = qkv[:, :, :q_per_group].flatten(1, 2)  # [s, n, d]
        k, v = qkv[:, :, -2], qkv[:, :, -1]
        if model.qk_norm:
            q = self._norm(f"{layer}.self_attention.q_layernorm", q)
            k = self._norm(f"{layer}.self_attention.k_layernorm", k)
        k, v = (part.repeat_interleave(q_per_group, dim=1) for part in (k, v))
        if model.position == "rope":
            cos, sin = self._rope(len(x))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # [1, n, s, d]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._linear(
            f"{layer}.self_attention.linear_proj", mixed[0].transpose(0, 1).flatten(1)
        )

    def _rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the cosine and sine [s, 1, d/2] of the rotary angles.

        They are computed in float64 for a float64 model and in float32 for others (RoFormer, arXiv
        2104.09864, eq. 15).
        """
        precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        frequency = inverse_frequencies(self.config.model).to(self.device, precise)
        position = torch.arange(length, dtype=precise, device=self.device)
        angle = (position[:, None] * frequency)[:, None]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def _mlp(self, name: str, norm: str, x: Tensor) -> Tensor:
        inner = self._linear(f"{name}.mlp.linear_fc1", self._norm(f"{name}.{norm}", x))
        if self.config.model.family == "llama":
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(inner, approximate=_APPROXIMATE[self.config.model.gelu])
        return self._linear(f"{name}.mlp.linear_fc2", inner)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        model, weight = self.config.model, self._tensors[f"{name}.weight"]
        if model.family == "llama":
            return F.rms_norm(x, weight.shape, weight, model.norm_eps)
        return F.layer_norm(x, weight.shape, weight, self._tensors[f"{name}.bias"], model.norm_eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [s, n, d], whose elements i and i + d/2 form a pair."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
