"""The early-exit model in plain PyTorch, teacher-forced: what every faster path is held against.

No cache, no batch, no ranks: tokens of a sequence go in, hidden states of every exit come out.

Legend of shapes: s sequence, h hidden, v vocabulary, n heads, d head dimension.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.architecture.tensor_parallel import group_qkv
from ee_llm.architecture.tensors import take_tensors
from ee_llm.config import Config
from ee_llm.errors import UserError

_APPROXIMATE = {"erf": "none", "tanh": "tanh"}  # torch's names


class ReferenceModel:
    """A llama- or gpt-style model with exits, built from a configuration and its tensors by name.

    Attributes: `config`; `boundaries`, those of all exits, shallow to deep, the final one last;
    `num_layers`; `dtype` and `device`, where it computes. Raises UserError when the tensors do
    not fit the configuration.
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
        self, tokens: Tensor, left_at: Sequence[int] | Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (boundary, hidden [s, h]) of every exit, shallow to deep, for int64 tokens [s].

        `hidden` is what the exit's output weight projects (see `logits`). Layers run as the walk
        goes on, so who stops at an exit does not pay for the layers above it.
        left_at: [s], the boundary from which on a row's residual stream is frozen (num_layers:
        never; None: no row's). In deeper layers its keys and values are those of the frozen stream,
        and it gets nothing itself (state propagation of CALM, arXiv 2207.07061): its own `hidden`
        of deeper exits means nothing.
        Raises UserError when there is no token, too many, or one beyond the vocabulary, or when
        `left_at` has another length or a boundary that no row can be frozen at.
        """
        self._check(tokens)
        frozen_at = self._frozen_at(left_at, len(tokens))
        x = self._embedded(tokens.to(self.device))
        for layer in range(1, self.num_layers + 1):
            name = f"layers.{layer}"
            live = (frozen_at >= layer)[:, None]
            attended = x + self._attention(name, x)
            x = torch.where(live, attended + self._mlp(name, "pre_mlp_layernorm", attended), x)
            if layer in self._temperature:
                yield layer, self._head(layer, x, attended)

    def logits(self, boundary: int, hidden: Tensor) -> Tensor:
        """Return the logits [..., v] of the exit at `boundary` for its hidden states [..., h]."""
        weight = self._tensors[output_weight_name(self.config, boundary)]
        return F.linear(hidden, weight) / self._temperature[boundary]

    def forward(self, tokens: Tensor) -> dict[int, Tensor]:
        """Return {boundary: logits [s, v]} of every exit for int64 tokens [s]."""
        return {boundary: self.logits(boundary, hidden) for boundary, hidden in self.walk(tokens)}

    def _check(self, tokens: Tensor) -> None:
        model = self.config.model
        if tokens.dim() != 1 or len(tokens) == 0:
            raise UserError(f"tokens need the shape [s], s at least 1, not {list(tokens.shape)}")
        if len(tokens) > model.max_seq_length:
            raise UserError(
                f"{len(tokens)} tokens are more than model.max_seq_length = {model.max_seq_length};"
                " shorten the prompt"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= model.vocab_size:
            raise UserError(
                f"token ids {int(tokens.min())} to {int(tokens.max())} do not fit model.vocab_size"
                f" = {model.vocab_size}; is this the tokenizer the model was trained with?"
            )

    def _frozen_at(self, left_at: Sequence[int] | Tensor | None, length: int) -> Tensor:
        if left_at is None:
            left_at = [self.num_layers] * length
        frozen_at = torch.as_tensor(left_at, device=self.device)
        if frozen_at.shape != (length,):
            raise UserError(
                f"left_at has the shape {list(frozen_at.shape)}; give one boundary for each of the"
                f" {length} tokens"
            )
        if int(frozen_at.min()) < 1 or int(frozen_at.max()) > self.num_layers:
            raise UserError(
                f"left_at has boundaries {int(frozen_at.min())} to {int(frozen_at.max())}; a row is"
                f" frozen at one in 1 .. {self.num_layers}"
            )
        return frozen_at

    def _embedded(self, tokens: Tensor) -> Tensor:
        x = self._tensors["embedding.word.weight"][tokens]
        if self.config.model.position == "learned":
            x = x + self._tensors["embedding.position.weight"][: len(tokens)]
        return x

    def _head(self, boundary: int, x: Tensor, attended: Tensor) -> Tensor:
        """Return what the exit at `boundary` projects: [block] -> [mlp] -> [norm] of x [s, h].

        Without a block the mlp reads the layer's residual stream after attention, `attended`, and
        stands in for the layer's own MLP (EE-Tuning, arXiv 2402.00518).
        """
        name = f"exits.{boundary}"
        parts = ("norm",) if boundary == self.num_layers else self.config.exits.head
        if "block" in parts:
            block = f"{name}.block"
            x = x + self._attention(block, x)
            x = attended = x + self._mlp(block, "pre_mlp_layernorm", x)
        if "mlp" in parts:
            x = attended + self._mlp(name, "mlp_norm", attended)
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
        """Return cos and sin [s, 1, d/2] of the rotary angles (RoFormer, arXiv 2104.09864, eq. 15).

        The angles are computed in float32, or in float64 for a float64 model.
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
    """Return x [s, n, d] rotated, the halves of d being the pairs (not interleaved)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
