"""Rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864) of half pairs.

Dimension i is paired with i + d / 2, not with its neighbor.

Shapes: s sequence, b microbatch, d head dimension.
"""

from typing import Any

import torch

from ee_llm import distributed
from ee_llm.architecture.rotary import inverse_frequencies
from ee_llm.config import ModelConfig

distributed.enable_megatron()
from megatron.core.transformer.attention import SelfAttention


class RotaryAngles(torch.nn.Module):
    """The rotation angles of queries and keys by position."""

    frequencies: torch.Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        frequencies = inverse_frequencies(config).to(distributed.device())
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Return angles [s, b, 1, d] for positions [b, s]."""
        angles = positions.t().to(self.wide).unsqueeze(-1) * self.frequencies.to(self.wide)
        return torch.cat([angles, angles], dim=-1).unsqueeze(2)


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention with `rotate` for queries and keys.

    megatron-core's unfused implementation computes sines and cosines separately for queries and
    keys, concatenates halves twice and copies the result, which costs 2 % of a training step on a
    CPU (docs/reference/benchmarks.md).
    """

    _angles: torch.Tensor | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return the output and bias; angles are [s, b, 1, d] or [s, 1, 1, d]."""
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **options)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *inputs: Any, **options: Any) -> Any:
        """Return rotated queries, rotated keys, and values [s, b, heads, d]."""
        query, key, value = super().get_query_key_value_tensors(*inputs, **options)
        if self._angles is None:
            return query, key, value
        cos, sin = self._angles.cos(), self._angles.sin()
        low, high = sin.chunk(2, dim=-1)
        cos, sin = cos.to(query.dtype), torch.cat([-low, high], dim=-1).to(query.dtype)
        return rotate(query, cos, sin), rotate(key, cos, sin), value


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of dimensions i and i + d / 2 of `heads` by its angle.

    This is eq. 34 of RoFormer with half pairs instead of adjacent pairs. `cos` and `sin` get no
    gradient, and there is no second derivative.

    Args:
        heads: Queries or keys [s, b, n, d] of n heads.
        cos: Cosines [s, b or 1, 1, d].
        sin: Sines [s, b or 1, 1, d], with the first half negated.
    """
    return _Rotate.apply(heads, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply_rotation(heads, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return (
            _apply_rotation(grads[0], cos, -sin),
            None,
            None,
        )  # The transpose of a rotation is its inverse.


def _apply_rotation(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    partners = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cos).addcmul_(partners, sin)
