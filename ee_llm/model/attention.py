"""Causal attention with torch's scaled_dot_product_attention and megatron-core's interface."""

from typing import Any

import torch

from ee_llm import distributed

distributed.enable_megatron()
from megatron.core.transformer.transformer_config import TransformerConfig

from ee_llm.model.dropout import head_region


class CausalAttention(torch.nn.Module):
    """Core attention of a layer: softmax(q k / sqrt(d)) v over this and earlier positions.

    It replaces megatron-core's DotProductAttention, supports any dtype, and lets torch select the
    kernel, which avoids storing the [s, s] scores where possible (on a CPU: without dropout).

    Shapes: s sequence, b microbatch, d head dimension, kv key and value heads.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        """Return [s, b, heads * d] from queries [s, b, heads, d] and keys, values [s, b, kv, d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        dropout = self.config.attention_dropout
        if self.training and dropout > 0:
            with head_region(self.config):
                out = _attend(q, k, v, dropout, grouped)
        else:
            out = _attend(q, k, v, 0.0, grouped)
        return out.permute(2, 0, 1, 3).flatten(2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, grouped: bool
) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped
    )
