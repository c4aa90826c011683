"""The gated linear layer of llama's MLP, used where Transformer Engine has no fused kernel.

Shapes: s sequence, b microbatch, h hidden, f MLP width, t tensor-parallel ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ee_llm.model.linear import ColumnLinear, Product

_silu_backward = torch.ops.aten.silu_backward.grad_input


class SwiGluLinear(ColumnLinear):
    """Compute silu(x G^T) * (x U^T) for the weight [G; U] (SwiGLU: Shazeer 2020, arXiv 2002.05202).

    The layer includes the activation, so that without tensor parallelism the outputs of gate and up
    projection are separate in memory. Reading them as halves of one wide output, row by row, costs
    2 % of a training step on a CPU (docs/reference/benchmarks.md).
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Product:
        """Return [s, b, f / t] and no bias from [s, b, h] ([s / t, b, h] if sequence parallel)."""
        if self.config.tensor_model_parallel_size > 1 or self.weight_gradients is not None:
            both, _ = super().forward(input_, weight, runtime_gather_output)
            gate, up = both.chunk(2, dim=-1)
            return silu(gate) * up, None
        return _SwiGluProduct.apply(input_, self.weight if weight is None else weight), None


class _SwiGluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        gate, up = (linear(hidden, half) for half in weight.chunk(2))
        activated = silu(gate)
        ctx.save_for_backward(hidden, weight, gate, up, activated)
        return activated * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight, gate, up, activated = (x.flatten(0, -2) for x in ctx.saved_tensors)
        grad = grads[0].flatten(0, -2)
        grad_gate = _silu_backward(grad * up, gate, grad_input=torch.empty_like(gate))
        grad_up = grad * activated
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            gate_weight, up_weight = weight.chunk(2)
            grad_hidden = (grad_gate @ gate_weight).addmm_(grad_up, up_weight)
            grad_hidden = grad_hidden.view(ctx.saved_tensors[0].shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for part, half in zip((grad_gate, grad_up), grad_weight.chunk(2), strict=True):
                torch.mm(part.t(), hidden, out=half)
        return grad_hidden, grad_weight


class NoActivation:
    """The activation of megatron-core's MLP for a first linear layer that includes it."""

    def __init__(self, config: Any = None) -> None:
        """Ignore the configuration that megatron-core passes to every module."""

    def __call__(self, activated: Tensor) -> Tensor:
        """Return `activated` unchanged, as `SwiGluLinear` applied the activation."""
        return activated
