"""Gates: small networks that predict whether an exit agrees with the final exit.

A gate reads the hidden state at its exit's boundary, so that it decides before the exit computes
anything. Gates are trained after the model and change none of its outputs.

Legend of shapes: r rows, h hidden, g gate width.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.config import Config
from ee_llm.errors import UserError

PREFIX = "gates."
"""Prefix of the names of gate tensors."""


class Gate:
    """The gate of one exit: linear layer, SiLU, linear layer, sigmoid.

    It computes in float32 at least, with weights that are not rounded to the model's dtype, since
    thresholds are often close to 1.
    """

    def __init__(self, tensors: Mapping[str, Tensor], boundary: int, eps: float) -> None:
        """Read the gate's tensors (see `gate_shapes`).

        Args:
            tensors: The tensors by name.
            boundary: Boundary of the exit.
            eps: The model's norm_eps.
        """
        names = gate_shapes(boundary, 1, 1)
        self._parameters = [tensors[name] for name in names]
        self._eps = eps

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the predicted probability [r] of agreement for rows [r, h] at the boundary."""
        return gate_logits(gate_input(hidden, self._eps), *self._parameters).sigmoid()


def gate_input(hidden: Tensor, eps: float) -> Tensor:
    """Return the input [r, h] of a gate: RMS-normalized rows [r, h], in float32 or float64."""
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.rms_norm(hidden.to(precise), hidden.shape[-1:], eps=eps)


def gate_logits(
    x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor
) -> Tensor:
    """Return the log odds [r] of agreement.

    Args:
        x: Input [r, h] from `gate_input`.
        weight_1, bias_1, weight_2, bias_2: [g, h], [g], [1, g], [1].
    """
    weights = (one.to(x.dtype) for one in (weight_1, bias_1, weight_2, bias_2))
    weight_1, bias_1, weight_2, bias_2 = weights
    inner = F.silu(F.linear(x, weight_1, bias_1))
    # A product with one output may round differently for other numbers of rows; a sum does not.
    return (inner * weight_2).sum(dim=-1) + bias_2


def gate_shapes(boundary: int, hidden_size: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of the gate at a boundary, in order."""
    name = f"{PREFIX}{boundary}"
    return {
        f"{name}.linear_1.weight": (width, hidden_size),
        f"{name}.linear_1.bias": (width,),
        f"{name}.linear_2.weight": (1, width),
        f"{name}.linear_2.bias": (1,),
    }


def gated_boundaries(names: Iterable[str]) -> frozenset[int]:
    """Return the boundaries of the gates among the names of a model's tensors."""
    return frozenset(int(name.split(".")[1]) for name in names if name.startswith(PREFIX))


def check_gates(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless the gate tensors with these shapes fit the model.

    Args:
        config: The model's configuration.
        shapes: Shapes of tensors by name; those of other tensors are ignored.
    """
    found = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
    wanted: dict[str, tuple[int, ...]] = {}
    for boundary in config.exits.boundaries:
        first = f"{PREFIX}{boundary}.linear_1.weight"
        if first in found:
            wanted |= gate_shapes(boundary, config.model.hidden_size, found[first][0])
    wrong = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"gate tensor {name} has shape {found.get(name)}, but the model requires"
            f" {wanted.get(name)}. Train the gates again with 'ee-llm calibrate --train-gate'."
        )
