"""Weight gradients that are put off, so that a stage can hand its input's gradient on first.

The backward pass of a linear layer has two products: with the weight, for the layer before, and
with the input, for the weight itself. Zero-bubble schedules compute the second when the rank would
otherwise wait (Qi et al., arXiv 2401.10241).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Pending = tuple[Tensor, Tensor, Tensor]  # weight [o, i], gradient of the output, input


class WeightGradients:
    """Makes linear layers whose weights' gradients can be put off."""

    def __init__(self) -> None:
        self.products: list[Pending] | None = None

    def linear(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return hidden [..., i] times the transpose of weight [o, i]."""
        return _Linear.apply(hidden, weight, self)

    @contextmanager
    def defer(self) -> Iterator[Callable[[], None]]:
        """Keep the weights of `linear` out of all backward passes within.

        Gives the function that computes them, to be called once, later: it adds them to `main_grad`
        where a weight has one, else to `grad`. Until then inputs and output gradients stay alive.
        """
        products: list[Pending] = []
        self.products = products
        try:
            yield lambda: _compute(products)
        finally:
            self.products = None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, later: WeightGradients) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight, ctx.later = weight, later
        return torch.nn.functional.linear(hidden, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        grad_hidden = grads[0] @ ctx.weight if ctx.needs_input_grad[0] else None
        product = (ctx.weight, grads[0].flatten(0, -2), hidden.detach().flatten(0, -2))
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None
        if ctx.later.products is None:
            return grad_hidden, product[1].t() @ product[2], None
        ctx.later.products.append(product)
        return grad_hidden, None, None


@torch.no_grad()
def _compute(products: list[Pending]) -> None:
    while products:  # each is let go as soon as it is done
        weight, grad_output, hidden = products.pop(0)
        total = getattr(weight, "main_grad", weight.grad)
        if total is None:
            weight.grad = grad_output.t() @ hidden
        elif total.dtype == hidden.dtype:
            total.addmm_(grad_output.t(), hidden)
        else:
            total.add_(grad_output.t() @ hidden)
