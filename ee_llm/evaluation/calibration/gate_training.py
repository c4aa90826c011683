"""Train the gates of exits: small networks that predict agreement with the final exit.

Legend of shapes: t tokens, b tokens of a batch, h hidden, g gate width.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.architecture.gates import gate_input, gate_logits, gate_shapes
from ee_llm.config import Config
from ee_llm.errors import DataError
from ee_llm.evaluation.calibration.options import MIN_TOKENS
from ee_llm.evaluation.measure import COLUMNS

WIDTH = 64
"""Width of a gate: its cost is below 1 % of a layer's in all but tiny models."""

_BATCH, _MAX_EPOCHS, _PATIENCE = 256, 20, 3
_LEARNING_RATE, _WEIGHT_DECAY = 1e-3, 0.05
_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class TrainedGate:
    """A gate and how well it ranks tokens.

    Attributes:
        boundary: Boundary of the exit.
        agreement: Share of tokens for which the exit agrees with the final exit.
        auc: Probability that a token that agrees has a higher confidence than one that does not, on
            tokens that did not train the gate; None without tokens of both kinds.
        tensors: The gate's tensors by name, float32.
    """

    boundary: int
    agreement: float
    auc: float | None
    tensors: dict[str, Tensor]


class GateTraining:
    """Collects hidden states and agreements, and trains gates; see `measure.HiddenCollector`."""

    def __init__(self, config: Config, seed: int) -> None:
        self._boundaries, self._seed = config.exits.boundaries, seed
        self._eps = config.model.norm_eps
        self._inputs: dict[int, list[Tensor]] = {b: [] for b in self._boundaries}
        self._labels: dict[int, list[Tensor]] = {b: [] for b in self._boundaries}

    def add_hidden(self, hidden: dict[int, Tensor]) -> None:
        for boundary, rows in hidden.items():  # Half precision: they may be many.
            self._inputs[boundary].append(gate_input(rows, self._eps).half().cpu())

    def add(self, columns: dict[int, Tensor]) -> None:
        for boundary in self._boundaries:
            self._labels[boundary].append(columns[boundary][COLUMNS.index("agreement")])

    def check(self, num_windows: int) -> None:
        pass  # The number of tokens counts.

    def result(self) -> list[dict[str, Any]]:
        found = []
        for boundary in self._boundaries:
            inputs, labels = torch.cat(self._inputs[boundary]), torch.cat(self._labels[boundary])
            gate = asdict(train_gate(boundary, inputs, labels, self._seed))
            gate["tensors"] = {name: one.tolist() for name, one in gate["tensors"].items()}
            found.append(gate)
        return found


def gates_of(found: list[dict[str, Any]]) -> list[TrainedGate]:
    """Return the gates of a `GateTraining` result."""
    return [
        TrainedGate(
            **one | {"tensors": {name: torch.tensor(v) for name, v in one["tensors"].items()}}
        )
        for one in found
    ]


def train_gate(boundary: int, inputs: Tensor, labels: Tensor, seed: int = 0) -> TrainedGate:
    """Return a gate that predicts `labels` from `inputs`.

    The loss is the cross entropy with both classes weighted equally, so that a gate learns to find
    the rarer one; the last bias then restores the true odds, so that its output is a probability.
    The last tenth of the tokens stops the training.

    Args:
        boundary: Boundary of the exit.
        inputs: Inputs [t, h], as from `gate_input`.
        labels: 1 [t] if the exit agrees with the final exit, else 0.
        seed: Seed of the initial weights and of the order of batches.

    Raises:
        DataError: There are fewer than `MIN_TOKENS` tokens.
    """
    if len(labels) < MIN_TOKENS:
        raise DataError(
            f"{len(labels):,} tokens are too few to train gates. Use gate_tokens ="
            f" {MIN_TOKENS:,} or more, and a text that is longer."
        )
    num_trained = len(labels) - int(_VALIDATION_SHARE * len(labels))
    train_x, x = inputs[:num_trained].float(), inputs[num_trained:].float()
    train_y, y = labels[:num_trained].float(), labels[num_trained:].float()
    positive = float(train_y.sum())
    negative = num_trained - positive
    names = list(gate_shapes(boundary, inputs.shape[1], WIDTH))
    parameters = _initial(boundary, inputs.shape[1], seed)
    if positive and negative:
        # Inputs in units of their spread; the first layer takes over the scale afterwards.
        # Units that hardly vary must not be blown up.
        mean, spread = train_x.mean(dim=0), train_x.std(dim=0)
        spread = spread.clamp(min=max(1e-6, 1e-3 * float(spread.median())))
        weights = (0.5 * num_trained / negative, 0.5 * num_trained / positive)
        _fit(parameters, (train_x - mean) / spread, train_y, (x - mean) / spread, y, weights, seed)
        with torch.no_grad():
            parameters[0] /= spread
            parameters[1] -= parameters[0] @ mean
    else:
        parameters[2].data.zero_()
    with torch.no_grad():
        parameters[3] += math.log((positive + 0.5) / (negative + 0.5))
        scores = gate_logits(x, *parameters)
    tensors = {name: one.detach() for name, one in zip(names, parameters, strict=True)}
    agreement, auc = float(labels.double().mean()), area_under_curve(scores, y)
    return TrainedGate(boundary, agreement, auc, tensors)


def _initial(boundary: int, hidden_size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in gate_shapes(boundary, hidden_size, WIDTH).values():
        bound = shape[-1] ** -0.5
        values = torch.rand(shape, generator=generator) * 2 * bound - bound
        parameters.append(values if len(shape) > 1 else torch.zeros(shape))
    return parameters


def _fit(
    parameters: list[Tensor],
    train_x: Tensor,
    train_y: Tensor,
    x: Tensor,
    y: Tensor,
    weights: tuple[float, float],
    seed: int,
) -> None:
    """Train parameters in place until the loss on x [t, h] with y [t] stops falling."""

    def loss(rows: Tensor, labels: Tensor) -> Tensor:
        logits = gate_logits(rows, *parameters)
        weight = torch.where(labels > 0.5, weights[1], weights[0])
        return F.binary_cross_entropy_with_logits(logits, labels, weight)

    for one in parameters:
        one.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    best, kept, num_worse = math.inf, [one.detach().clone() for one in parameters], 0
    for _ in range(_MAX_EPOCHS):
        for batch in torch.randperm(len(train_y), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            loss(train_x[batch], train_y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            found = float(loss(x, y))
        if found < best:
            best, kept, num_worse = found, [one.detach().clone() for one in parameters], 0
        elif (num_worse := num_worse + 1) == _PATIENCE:
            break
    with torch.no_grad():
        for one, value in zip(parameters, kept, strict=True):
            one.requires_grad_(False)
            one.copy_(value)


def area_under_curve(scores: Tensor, labels: Tensor) -> float | None:
    """Return the area under the ROC curve of scores [t] for labels [t] of 0 and 1.

    It is the probability that a token with label 1 has the higher score; equal scores count half.
    None without both labels.
    """
    positive = labels > 0.5
    count = int(positive.sum())
    if count in (0, len(labels)):
        return None
    _, ranks, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_ranks = (ends - (counts - 1) / 2)[ranks]
    total = float(mean_ranks[positive].sum()) - count * (count + 1) / 2
    return total / (count * (len(labels) - count))
