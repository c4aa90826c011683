"""Rotary position embedding (RoFormer, Su et al. 2021, arXiv 2104.09864), halves not interleaved.

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
    """Angles by which queries and keys turn, from their positions."""

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
    """megatron-core's self-attention that turns queries and keys by `rotate`.

    megatron-core's own unfused formula takes sines and cosines for each of them, joins halves twice
    and copies the result: 2 % of a training step on a CPU (docs/reference/benchmarks.md).
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
        """Return output and bias as megatron-core's; angles are [s, b, 1, d] or [s, 1, 1, d]."""
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **options)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *inputs: Any, **options: Any) -> Any:
        """Return queries, keys and values [s, b, heads, d], the first two at their positions."""
        query, key, value = super().get_query_key_value_tensors(*inputs, **options)
        if self._angles is None:
            return query, key, value
        cos, sin = self._angles.cos(), self._angles.sin()
        low, high = sin.chunk(2, dim=-1)
        cos, sin = cos.to(query.dtype), torch.cat([-low, high], dim=-1).to(query.dtype)
        return rotate(query, cos, sin), rotate(key, cos, sin), value


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of `heads` [s, b, n, d], dimensions i and i + d / 2, by its angle.

    RoFormer, eq. 34, with halves in the place of neighbours. `cos` and `sin` are [s, b or 1, 1, d],
    the first half of `sin` negated. They get no gradient, and there is no second derivative.
    """
    return _Rotate.apply(heads, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(heads, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None  # the transpose of a rotation turns back


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    partners = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cos).addcmul_(partners, sin)
