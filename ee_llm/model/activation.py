"""The gated activation of llama's MLP, where no fused kernel of Transformer Engine's does it."""

from typing import Any

import torch
from torch.nn.functional import silu

_silu_backward = torch.ops.aten.silu_backward.grad_input


class SwiGlu:
    """silu(gate) * up of a linear layer's output [gate; up] (Shazeer 2020, arXiv 2002.05202).

    The backward pass writes both halves of the gradient in place. megatron-core's own formula, in
    plain autograd, also adds a constant 0 to `up`, keeps that sum, and joins the halves by a copy.
    """

    def __init__(self, config: Any = None) -> None:
        """Take megatron-core's configuration, as it builds every part; nothing in it matters."""

    def __call__(self, both: torch.Tensor) -> torch.Tensor:
        """Return [..., f] from [..., 2 f]."""
        return _SwiGlu.apply(both)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        activated = silu(gate)
        ctx.save_for_backward(both, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        both, activated = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grads[0], activated, out=grad_up)
        _silu_backward(grads[0] * up, gate, grad_input=grad_gate)
        return result
