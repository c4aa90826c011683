"""Deferred weight gradients, which let a stage send the gradient of its input first.

The backward pass of a linear layer has two products: with the weight, for the previous layer, and
with the input, for the weight gradient. Zero-bubble schedules compute the second one when the rank
would otherwise be idle (Qi et al., arXiv 2401.10241).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Pending = tuple[Tensor, Tensor, Tensor]  # weight [o, i], gradient of the output, input


class WeightGradients:
    """Linear products whose weight gradients can be deferred."""

    def __init__(self) -> None:
        self.products: list[Pending] | None = None

    def linear(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return the product of hidden [..., i] and the transpose of weight [o, i]."""
        return _Linear.apply(hidden, weight, self)

    @contextmanager
    def defer(self) -> Iterator[Callable[[], None]]:
        """Defer the weight gradients of `linear` in all backward passes within the context.

        Yields a function that computes them and adds them to the weight's `main_grad` if it has
        one, else to its `grad`. Call it once, after the context. Until then, the inputs and output
        gradients stay in memory.
        """
        products: list[Pending] = []
        self.products = products
        try:
            yield lambda: _compute(products)
        finally:
            self.products = None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, gradients: WeightGradients) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.gradients = weight, gradients
        return torch.nn.functional.linear(hidden, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        grad_hidden = grads[0] @ ctx.weight if ctx.needs_input_grad[0] else None
        product = (ctx.weight, grads[0].flatten(0, -2), hidden.detach().flatten(0, -2))
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None
        if ctx.gradients.products is None:
            return grad_hidden, product[1].t() @ product[2], None
        ctx.gradients.products.append(product)
        return grad_hidden, None, None


@torch.no_grad()
def _compute(products: list[Pending]) -> None:
    while products:  # Free the tensors of each product as soon as it is computed.
        weight, grad_output, hidden = products.pop(0)
        total = getattr(weight, "main_grad", weight.grad)
        if total is None:
            weight.grad = grad_output.t() @ hidden
        elif total.dtype == hidden.dtype:
            total.addmm_(grad_output.t(), hidden)
        else:
            total.add_(grad_output.t() @ hidden)
