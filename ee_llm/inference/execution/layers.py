"""Transformer layers for decoding that keep keys and values in a paged cache.

A tensor-parallel rank has its share of the heads and of the MLP's width; every rank has all of the
norms and of the residual stream.

Legend of shapes: t rows, u rows that attend, h hidden, k key/value heads of this rank, r queries
per key/value head, d head dimension, f feed-forward, c positions in the cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.architecture.tensor_parallel import group_qkv, tensor_split
from ee_llm.config import ModelConfig
from ee_llm.inference.execution.attention import Batch, attend
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.quantization import Int8Linear

Reduce = Callable[[Tensor], Tensor]
MakeLinear = Callable[..., Linear | Int8Linear]  # from a weight and an optional bias


@dataclass(frozen=True)
class Shard:
    """The share of a model that one tensor-parallel rank has.

    Attributes:
        rank: Number of the rank.
        size: Number of ranks.
        reduce: Function that sums a tensor over all ranks.
        linear: Class of the linear layers.
    """

    rank: int = 0
    size: int = 1
    reduce: Reduce = lambda partial: partial
    linear: MakeLinear = Linear

    def parameter(self, model: ModelConfig, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """Return this rank's shard of a parameter; all of it if the parameter is not split."""
        split = tensor_split(name, model)
        return tensors[name] if split is None else split.shard(tensors[name], self.rank, self.size)

    def parameters(
        self, model: ModelConfig, tensors: Mapping[str, Tensor], name: str
    ) -> tuple[Tensor, Tensor | None]:
        """Return this rank's shards of the weight and the optional bias of a linear layer."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        has_bias = bias in tensors
        return (
            self.parameter(model, tensors, weight),
            self.parameter(model, tensors, bias) if has_bias else None,
        )


class Norm:
    """RMSNorm (llama) or LayerNorm (gpt) of rows [t, h]."""

    def __init__(self, model: ModelConfig, tensors: Mapping[str, Tensor], name: str) -> None:
        self._weight = tensors[f"{name}.weight"]
        self._bias = tensors.get(f"{name}.bias")
        self._eps = model.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is None:
            return F.rms_norm(x, self._weight.shape, self._weight, self._eps)
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class Translator:
    """An affine map of RMS-normalized rows [t, h] (tuned lens, arXiv 2303.08112).

    Every tensor-parallel rank has all of it.
    """

    def __init__(
        self, model: ModelConfig, tensors: Mapping[str, Tensor], name: str, shard: Shard
    ) -> None:
        self._linear = shard.linear(*shard.parameters(model, tensors, name))
        self._eps = model.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(F.rms_norm(x, (x.shape[-1],), eps=self._eps))


class Mlp:
    """Norm and MLP of rows [t, h], without the residual: SwiGLU (llama) or GELU (gpt)."""

    def __init__(
        self, model: ModelConfig, tensors: Mapping[str, Tensor], name: str, norm: str, shard: Shard
    ) -> None:
        self._norm = Norm(model, tensors, norm)
        self._is_gated = model.family == "llama"
        self._approximate = "tanh" if model.gelu == "tanh" else "none"
        self._fc1 = shard.linear(*shard.parameters(model, tensors, f"{name}.linear_fc1"))
        fc2, self._fc2_bias = shard.parameters(model, tensors, f"{name}.linear_fc2")
        self._fc2 = shard.linear(fc2)
        self._reduce = shard.reduce

    def __call__(self, x: Tensor) -> Tensor:
        inner = self._fc1(self._norm(x))
        if self._is_gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate).mul_(up)
        else:
            inner = F.gelu(inner, approximate=self._approximate)
        return _with_bias(self._reduce(self._fc2(inner)), self._fc2_bias)


class Layer:
    """A transformer layer that writes keys and values to its part of the cache."""

    def __init__(
        self, model: ModelConfig, tensors: Mapping[str, Tensor], name: str, shard: Shard
    ) -> None:
        self._dim = model.head_dim
        self._num_kv = model.num_kv_heads // shard.size
        self._per_kv = model.num_heads // model.num_kv_heads
        self._norm = Norm(model, tensors, f"{name}.input_layernorm")
        qkv, bias = shard.parameters(model, tensors, f"{name}.self_attention.linear_qkv")
        self._qkv = shard.linear(
            self._queries_first(model, qkv),
            None if bias is None else self._queries_first(model, bias),
        )
        self._qk_norm = QkNorm(model, tensors, name, self._num_kv) if model.qk_norm else None
        proj, self._proj_bias = shard.parameters(
            model, tensors, f"{name}.self_attention.linear_proj"
        )
        self._proj = shard.linear(proj)
        self._mlp = Mlp(model, tensors, f"{name}.mlp", f"{name}.pre_mlp_layernorm", shard)
        self._reduce = shard.reduce
        self._before_attention: Callable[[Tensor], Tensor] = self._project
        self._after_attention: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._finish

    def compile(self) -> None:
        """Run the parts before and after the attention through torch.compile.

        Both take only rows as arguments, so all layers share the compiled code.
        """
        self._before_attention = torch.compile(self._project, dynamic=True)
        self._after_attention = torch.compile(self._finish, dynamic=True)

    def __call__(
        self, x: Tensor, pages: Tensor, batch: Batch, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the live rows [u, h] after the layer, and before its MLP.

        Args:
            x: Rows [t, h].
            pages: The cache [c, 2, k, d]; the keys and values of all t rows are written to it.
            batch: Metadata of the rows.
            rotation: Rotary factors [t, 1, d / 2], complex; None without rotary positions.
        """
        num_queries = self._num_kv * self._per_kv
        qkv = self._before_attention(x).to(pages.dtype)
        if rotation is not None:
            pairs = qkv[:, : num_queries + self._num_kv].unflatten(-1, (-1, 2))
            _rotate(pairs, rotation)
        pages.index_copy_(0, batch.writes, qkv[:, num_queries:].unflatten(1, (2, self._num_kv)))
        queries = qkv[:, :num_queries].unflatten(1, (self._num_kv, self._per_kv))
        if batch.live is not None:
            x, queries = x[batch.live], queries[batch.live]
            if len(x) == 0:
                return x, x
        return self._after_attention(x, attend(queries, pages, batch).to(x.dtype))

    def _project(self, x: Tensor) -> Tensor:
        """Return the unrotated queries, keys and values [t, k (r + 2), d] of rows [t, h]."""
        num_normed = self._num_kv * (self._per_kv + 1)
        qkv = self._qkv(self._norm(x)).view(len(x), num_normed + self._num_kv, self._dim)
        if self._qk_norm is not None:
            self._qk_norm(qkv[:, :num_normed])
        return qkv

    def _finish(self, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [u, h] after the layer and before its MLP; attention [u, k r d]."""
        attended = x + _with_bias(self._reduce(self._proj(attention)), self._proj_bias)
        return attended + self._mlp(attended), attended

    def _queries_first(self, model: ModelConfig, weight: Tensor) -> Tensor:
        """Return a fused weight or bias with its rows in the order [queries; keys; values].

        In the checkpoint, each key/value head has its queries, its key and its value one after the
        other, and a rotation pairs elements i and i + d / 2. Here the two elements are adjacent, so
        that a rotation is one complex product; queries and keys are permuted alike.
        """
        heads = group_qkv(model, weight)
        rotated = heads[:, : self._per_kv + 1]
        if model.position == "rope":
            rotated = _interleave_halves(rotated, dim=2)
        parts = (rotated[:, :-1], rotated[:, -1], heads[:, -1])
        return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])


class QkNorm:
    """RMSNorm of each query and key over d; its weights are permuted as those of the layer are."""

    def __init__(
        self, model: ModelConfig, tensors: Mapping[str, Tensor], layer: str, num_kv: int
    ) -> None:
        parts = []
        for kind, count in (("q", num_kv * model.num_heads // model.num_kv_heads), ("k", num_kv)):
            weight = tensors[f"{layer}.self_attention.{kind}_layernorm.weight"]
            if model.position == "rope":
                weight = _interleave_halves(weight, dim=0)
            parts.append(weight.expand(count, -1))
        self._weight = torch.cat(parts)
        self._eps = model.norm_eps

    def __call__(self, heads: Tensor) -> None:
        """Normalize queries and keys [t, k (r + 1), d] in place."""
        heads.copy_(F.rms_norm(heads, heads.shape[-1:], None, self._eps) * self._weight)


def _interleave_halves(x: Tensor, dim: int) -> Tensor:
    """Return x with elements i and i + d / 2 of dimension `dim` next to each other."""
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def rotations(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the rotary factors [positions, 1, d / 2] of RoFormer (arXiv 2104.09864, eq. 15).

    They are complex128 for float64, else complex64; None if the model has no rotary positions.
    """
    if model.position != "rope":
        return None
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = inverse_frequencies(model).to(precise)
    angle = torch.arange(model.max_seq_length, dtype=precise)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)[:, None].to(device)


def _rotate(pairs: Tensor, rotation: Tensor) -> None:
    """Rotate pairs [t, n, d / 2, 2] in place, in float32 or float64."""
    if pairs.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(pairs).mul_(rotation)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * rotation))


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
