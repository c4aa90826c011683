"""Run a model over windows of text and collect what every exit predicts.

On pipeline stages, the input of each exit's output projection travels to the last stage together
with the hidden states, at the same size, and confidences by measures of hidden states with it. The
last stage projects all of them, since the divergence needs two distributions in one place. Logits
never travel. Afterwards, the result goes to all ranks.

Legend of shapes: t tokens of a window, r rows of a chunk, c columns, h hidden, v vocabulary, n
tensor-parallel ranks.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.data.windows import (
    TargetWindow,
    check_counted,
    check_window,
    counted_positions,
)
from ee_llm.errors import RunError
from ee_llm.evaluation.row_statistics import Gather, RowStatistics, divergence, row_statistics
from ee_llm.inference.choices import Measure, logit_measure
from ee_llm.inference.execution.stage import Projection
from ee_llm.inference.execution.teacher_forced import TeacherForced

MAX_LOGITS = 1 << 22
"""Logits of an exit in a chunk of rows, 16 MiB of float32; five such tensors are alive at once:
two of log probabilities, and three in `divergence`."""

COLUMNS = ("loss", "agreement", "kl_to_final", "confidence", "accuracy")
"""What is measured of each exit at every position."""


class Collector(Protocol):
    """What becomes of the columns of all windows, on every rank of the last stage."""

    def add(self, columns: dict[int, Tensor]) -> None:
        """Take `COLUMNS` [c, t] of each exit, float64, for the counted tokens of a window."""

    def check(self, num_windows: int) -> None:
        """Raise DataError if so many windows are too few. Called on all ranks of all stages."""

    def result(self) -> list[dict[str, Any]]:
        """Return the result, of values that JSON can represent. Called once, at the end."""


@runtime_checkable
class HiddenCollector(Collector, Protocol):
    """A collector that also takes the hidden states of early exits."""

    def add_hidden(self, hidden: dict[int, Tensor]) -> None:
        """Take the hidden states [t, h] at the boundary of each early exit, before `add`."""


@runtime_checkable
class LogitCollector(Collector, Protocol):
    """A collector that also takes the logits of early exits."""

    def add_logits(
        self, boundary: int, logits: Tensor, final_top: Tensor, first_id: int, gather: Gather
    ) -> None:
        """Take the logits of an early exit at some counted tokens, in order, before `add`.

        All tensor-parallel ranks of the last stage call this together.

        Args:
            boundary: Boundary of the exit.
            logits: Logits [r, v / n] of this rank's part of the vocabulary.
            final_top: Id [r] of the final exit's most probable token.
            first_id: Vocabulary id of the first column.
            gather: Exchange between the ranks.
        """


def measure(
    model: TeacherForced,
    config: Config,
    windows: Iterable[Tensor | TargetWindow],
    collector: Collector,
    eos_token_id: int | None = None,
    ranks: distributed.InferenceGrid | None = None,
    on_tokens: Callable[[int], None] | None = None,
    confidence: Measure = "max_probability",
    max_logits: int = MAX_LOGITS,
) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of predicted tokens and the collector's result, on every rank.

    Args:
        model: This rank's part of the model.
        config: The model's configuration.
        windows: Token ids, int64 [t + 1], or windows with their targets, the same on all ranks.
        collector: Takes what is measured.
        eos_token_id: Id of the end token: its successors do not count. None counts all tokens.
        ranks: The ranks that run the model together; all of them call this function.
        on_tokens: Called with the number of tokens of each window.
        confidence: The measure of confidence.
        max_logits: Number of logits of an exit that a rank computes at once.

    Raises:
        DataError: The data has a token id outside the vocabulary, on all ranks, or too few targets.
        RunError: The loss of an exit is not finite.
    """
    boundaries = (*config.exits.boundaries, config.model.num_layers)
    is_last = ranks is None or ranks.stage + 1 == ranks.num_stages
    projections = {b: model.projection(b) for b in boundaries} if is_last else {}
    keeps_hidden = collector if isinstance(collector, HiddenCollector) else None
    keeps_logits = collector if isinstance(collector, LogitCollector) else None
    num_rows = max(1, max_logits // model.num_logits)
    num_tokens = num_windows = 0
    for one in windows:
        window, is_target = one if isinstance(one, TargetWindow) else (one, None)
        if is_target is None:
            is_target = counted_positions(window, eos_token_id)
        check_window(window, config.model.vocab_size)
        tokens, targets = window[:-1], window[1:]
        found = _exit_rows(
            model, tokens, config.model.hidden_size, ranks, confidence, keeps_hidden is not None
        )
        rows = is_target.nonzero()[:, 0]
        if is_last and len(rows):
            chunks = rows.split(num_rows)
            if keeps_hidden is not None:
                hidden = {b: one.hidden for b, one in found.items() if one.hidden is not None}
                keeps_hidden.add_hidden({b: one[rows.to(one.device)] for b, one in hidden.items()})
            columns = _columns(
                projections, found, targets, chunks, model, ranks, confidence, keeps_logits
            )
            collector.add(columns)
        num_tokens += len(rows)
        num_windows += len(rows) > 0
        if on_tokens is not None:
            on_tokens(len(targets))
    check_counted(num_tokens)
    collector.check(num_windows)
    result = collector.result() if is_last else []
    return num_tokens, _share(result, model, config, ranks)


@dataclass(frozen=True)
class _ExitRows:
    """The rows of a window at an exit, on the last stage.

    Attributes:
        features: Input [t, h] of the exit's output projection.
        confidence: Confidence [t] by a measure of hidden states, float64, None for other measures.
        hidden: Hidden states [t, h] at the exit's boundary, None if nothing needs them.
    """

    features: Tensor
    confidence: Tensor | None = None
    hidden: Tensor | None = None


@torch.no_grad()
def _exit_rows(
    model: TeacherForced,
    tokens: Tensor,
    hidden_size: int,
    ranks: distributed.InferenceGrid | None,
    measure: Measure,
    has_hidden: bool,
) -> dict[int, _ExitRows]:
    """Return the rows of every exit by boundary on the last stage, nothing on other stages."""
    next_stage = ranks if ranks is not None and ranks.stage + 1 < ranks.num_stages else None
    found: dict[int, _ExitRows] = {}

    def pass_on(boundary: int, rows: _ExitRows) -> None:
        if next_stage is None:
            found[boundary] = rows
            return
        message = b"" if rows.confidence is None else rows.confidence.cpu().numpy().tobytes()
        next_stage.send_next(message, rows.features)
        if rows.hidden is not None:
            next_stage.send_next(b"", rows.hidden)

    for boundary in model.earlier:
        assert ranks is not None, "a stage before this one has exits"
        message, features = ranks.receive_previous(hidden_size, model.dtype)
        values = torch.frombuffer(bytearray(message), dtype=torch.float64) if message else None
        hidden = ranks.receive_previous(hidden_size, model.dtype)[1] if has_hidden else None
        pass_on(boundary, _ExitRows(features, values, hidden))
    for exit in model(tokens):
        is_early = not exit.is_final
        confidence = None
        if is_early and (measure == "gate" or measure == "saturation"):
            confidence = exit.confidences(measure)
        hidden = exit.hidden if is_early and has_hidden else None
        pass_on(exit.boundary, _ExitRows(exit.features(), confidence, hidden))
    return found


@torch.no_grad()
def _columns(
    projections: dict[int, Projection],
    found: dict[int, _ExitRows],
    targets: Tensor,
    chunks: Iterable[Tensor],
    model: TeacherForced,
    ranks: distributed.InferenceGrid | None,
    confidence: Measure,
    keeps_logits: LogitCollector | None,
) -> dict[int, Tensor]:
    """Return `COLUMNS` [c, t] of each exit, in chunks so that few logits are alive at once."""
    gather: Gather = (lambda part: part) if ranks is None else ranks.gather
    *early, final_boundary = found
    parts: dict[int, list[Tensor]] = {boundary: [] for boundary in found}
    targets = targets.to(found[final_boundary].features.device)

    def logits_of(boundary: int, rows: Tensor) -> Tensor:
        return projections[boundary](found[boundary].features[rows])

    def statistics(
        logits: Tensor, rows: Tensor, measure: Measure, predicted: Tensor | None = None
    ) -> RowStatistics:
        return row_statistics(logits, targets[rows], model.first_id, gather, measure, predicted)

    for chunk in chunks:
        rows = chunk.to(targets.device)
        final = statistics(logits_of(final_boundary, rows), rows, logit_measure(confidence))
        predicted: Tensor | None = None
        for boundary, exit in found.items():
            one = final
            if boundary in early:
                logits = logits_of(boundary, rows)
                if keeps_logits is not None:
                    keeps_logits.add_logits(boundary, logits, final.top, model.first_id, gather)
                one = statistics(logits, rows, confidence, predicted)
                predicted = one.predicted
            values = {
                "loss": one.loss,
                "agreement": one.top == final.top,
                "accuracy": one.top == targets[rows],
                "kl_to_final": (
                    divergence(final.logprobs, one.logprobs, gather)
                    if boundary in early
                    else torch.zeros_like(one.loss)
                ),
                "confidence": (
                    one.confidence
                    if exit.confidence is None
                    else exit.confidence.to(rows.device)[rows]
                ),
            }
            parts[boundary].append(torch.stack([values[name].double() for name in COLUMNS]).cpu())
    columns = {boundary: torch.cat(chunks, dim=1) for boundary, chunks in parts.items()}
    for boundary, column in columns.items():
        if not column.isfinite().all():
            dtype = str(model.dtype).removeprefix("torch.")
            advice = "The weights are damaged. Check the checkpoint."
            if model.dtype.itemsize < torch.float32.itemsize:
                advice = "Use dtype = float32, and check the checkpoint if it still is not."
            raise RunError(
                f"the loss of the exit after layer {boundary} is not finite in {dtype}. {advice}"
            )
    return columns


def _share(
    found: list[dict[str, Any]],
    model: TeacherForced,
    config: Config,
    ranks: distributed.InferenceGrid | None,
) -> list[dict[str, Any]]:
    """Return on every rank what the last stage has found: to the leader, then down the stages."""
    if ranks is None or ranks.num_stages == 1:
        return found
    by_stage = ranks.gather_to_leader({ranks.stage: found})
    if ranks.stage == 0:
        last = by_stage[ranks.num_stages - 1] if ranks.is_leader else []
        message = ranks.broadcast(json.dumps(last).encode())
    else:
        message, _ = ranks.receive_previous(config.model.hidden_size, model.dtype)
    if ranks.stage + 1 < ranks.num_stages:
        nothing = torch.empty(0, config.model.hidden_size, dtype=model.dtype)
        ranks.send_next(message, nothing)
    ranks.flush()
    received: list[dict[str, Any]] = json.loads(message)
    return received
