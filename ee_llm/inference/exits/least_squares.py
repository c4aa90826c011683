"""Least-squares initialization of translators: the best affine map to the final hidden state.

Legend of shapes: t tokens of a window, h hidden.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.data.windows import Windows, check_window
from ee_llm.inference.execution.teacher_forced import TeacherForced
from ee_llm.inference.exits.new_exits import (
    check_finite,
    tensors_with_new_exits,
    with_new_exits,
)

RIDGE = 1e-3
"""Regularization, as a share of the mean squared input."""


def least_squares(
    reader: TensorReader,
    config: Config,
    boundaries: Sequence[int],
    windows: Windows,
    ranks: distributed.InferenceGrid | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Return the translators of the exits at `boundaries`: their parameters by name, float64.

    The translator of boundary b is the ridge regression from x to y over all positions, where x is
    the input of the translator and y the residual stream at the final boundary, both divided by
    their root mean square: an exit behind it approximates the final exit with the exit's own norm
    and output weight (the tuned lens, arXiv 2303.08112, in closed form). With X = [x, 1],

        [W, b]^T = (X^T X + lambda I)^-1 X^T y,  lambda = RIDGE * mean(diag(X^T X)).

    One pass over the data serves all boundaries. Products of a window are float32 (float64 for a
    float64 model), their sums float64 and in the order of the data, so every run gives the same
    result.

    Args:
        reader: The checkpoint.
        config: Configuration of the model with the new exits among its exits.
        boundaries: Boundaries of the new exits.
        windows: The data.
        ranks: Tensor- and pipeline-parallel ranks that run the model together. All of them call
            this function with the same data; the leader gets the result, the others nothing.
        on_tokens: Called with the number of tokens of each window.

    Raises:
        DataError: The data has a token id outside the vocabulary, on all ranks.
        RunError: The hidden states of an exit or of the final exit are not finite.
    """
    model = config.model
    config = with_new_exits(config, boundaries)
    tensors = tensors_with_new_exits(reader, config)
    run = TeacherForced(config, tensors, model.max_seq_length, ranks)
    is_summing = ranks is None or ranks.tensor_rank == 0  # Tensor ranks have equal hidden states.
    here = [boundary for boundary in run.boundaries if boundary in boundaries]
    sums = {boundary: Regression(model.hidden_size) for boundary in here if is_summing}
    for window in windows:
        check_window(window, model.vocab_size)
        inputs: dict[int, Tensor] = {}
        final = torch.empty(0)
        for exit in run(window[:-1]):
            if exit.boundary == model.num_layers:
                final = normalized(exit.hidden, model.norm_eps)
            else:
                inputs[exit.boundary] = normalized(exit.translator_input(), model.norm_eps)
        if ranks is not None:
            final = ranks.broadcast_from_last(
                final, (len(window) - 1, model.hidden_size), run.dtype
            )
        for boundary, total in sums.items():
            total.add(inputs[boundary], final)
        if on_tokens is not None:
            on_tokens(len(window) - 1)
    solved = {boundary: total.solve(boundary, run.dtype) for boundary, total in sums.items()}
    if ranks is not None:
        solved = ranks.gather_to_leader(solved)
    return {
        f"exits.{boundary}.translator.{name}": tensor
        for boundary, (weight, bias) in sorted(solved.items())
        for name, tensor in (("weight", weight), ("bias", bias))
    }


class Regression:
    """The ridge regression of one boundary, from sums over its rows (see `least_squares`)."""

    def __init__(self, hidden_size: int) -> None:
        size, device = hidden_size + 1, distributed.device()
        self._inputs = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._products = torch.zeros(size, hidden_size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x [t, h] with targets y [t, h]."""
        x = F.pad(x, (0, 1), value=1.0)
        self._inputs += x.T @ x
        self._products += x.T @ y

    def solve(self, boundary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight [h, h] and the bias [h]; raises RunError if a sum is not finite."""
        check_finite(boundary, dtype, self._inputs, self._products)
        self._inputs.diagonal().add_(RIDGE * self._inputs.diagonal().mean())
        solution = torch.cholesky_solve(self._products, torch.linalg.cholesky(self._inputs)).cpu()
        return solution[:-1].T.contiguous(), solution[-1].contiguous()


def normalized(hidden: Tensor, eps: float) -> Tensor:
    """Return rows [t, h] divided by their root mean square."""
    return F.rms_norm(hidden, hidden.shape[-1:], eps=eps)
