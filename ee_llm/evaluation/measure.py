"""Run a model over windows of text and collect what every exit predicts.

On pipeline stages, the input of each exit's output projection travels to the last stage together
with the hidden states, at the same size. The last stage projects all of them, since the divergence
needs two distributions in one place. Logits never travel. Afterwards, the result goes to all ranks.

Legend of shapes: t tokens of a window, r rows of a chunk, h hidden, v vocabulary, n tensor-parallel
ranks.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.data.windows import check_counted, check_window, counted_positions
from ee_llm.errors import RunError
from ee_llm.evaluation.row_statistics import RowStatistics, divergence, row_statistics
from ee_llm.inference.choices import Measure
from ee_llm.inference.execution.stage import Projection
from ee_llm.inference.execution.teacher_forced import TeacherForced

MAX_LOGITS = 1 << 22
"""Logits of an exit in a chunk of rows, 16 MiB of float32; five such tensors are alive at once:
two of log probabilities, and three in `divergence`."""

COLUMNS = ("loss", "agreement", "kl_to_final", "confidence")
"""What is measured of each exit at every position."""


class Collector(Protocol):
    """What becomes of the columns of all windows, on every rank of the last stage."""

    def add(self, columns: dict[int, Tensor]) -> None:
        """Take `COLUMNS` [4, t] of each exit, float64, for the counted tokens of a window."""

    def check(self, num_windows: int) -> None:
        """Raise DataError if so many windows are too few. Called on all ranks of all stages."""

    def result(self) -> list[dict[str, Any]]:
        """Return the result, of values that JSON can represent. Called once, at the end."""


def measure(
    model: TeacherForced,
    config: Config,
    windows: Iterable[Tensor],
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
        windows: Token ids, int64 [t + 1], the same on all ranks.
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
    num_rows = max(1, max_logits // model.num_logits)
    num_tokens = num_windows = 0
    for window in windows:
        check_window(window, config.model.vocab_size)
        tokens, targets = window[:-1], window[1:]
        features = _features(model, tokens, config.model.hidden_size, ranks)
        rows = counted_positions(window, eos_token_id).nonzero()[:, 0]
        if is_last and len(rows):
            chunks = rows.split(num_rows)
            collector.add(
                _columns(projections, features, targets, chunks, model, ranks, confidence)
            )
        num_tokens += len(rows)
        num_windows += len(rows) > 0
        if on_tokens is not None:
            on_tokens(len(targets))
    check_counted(num_tokens)
    collector.check(num_windows)
    found = collector.result() if is_last else []
    return num_tokens, _share(found, model, config, ranks)


@torch.no_grad()
def _features(
    model: TeacherForced, tokens: Tensor, hidden_size: int, ranks: distributed.InferenceGrid | None
) -> dict[int, Tensor]:
    """Return the input [t, h] of each exit's output projection on the last stage, else nothing."""
    next_stage = ranks if ranks is not None and ranks.stage + 1 < ranks.num_stages else None
    found: dict[int, Tensor] = {}

    def pass_on(boundary: int, features: Tensor) -> None:
        if next_stage is None:
            found[boundary] = features
        else:
            next_stage.send_next(b"", features)

    for boundary in model.earlier:
        assert ranks is not None, "a stage before this one has exits"
        pass_on(boundary, ranks.receive_previous(hidden_size, model.dtype)[1])
    for exit in model(tokens):
        pass_on(exit.boundary, exit.features())
    return found


@torch.no_grad()
def _columns(
    projections: dict[int, Projection],
    features: dict[int, Tensor],
    targets: Tensor,
    chunks: Iterable[Tensor],
    model: TeacherForced,
    ranks: distributed.InferenceGrid | None,
    confidence: Measure,
) -> dict[int, Tensor]:
    """Return `COLUMNS` [4, t] of each exit, in chunks so that few logits are alive at once."""
    gather = (lambda part: part) if ranks is None else ranks.gather
    *early, final_boundary = features
    parts: dict[int, list[Tensor]] = {boundary: [] for boundary in features}
    targets = targets.to(features[final_boundary].device)

    def statistics(boundary: int, rows: Tensor) -> RowStatistics:
        logits = projections[boundary](features[boundary][rows])
        return row_statistics(logits, targets[rows], model.first_id, gather, confidence)

    for chunk in chunks:
        rows = chunk.to(targets.device)
        final = statistics(final_boundary, rows)
        for boundary in features:
            one = statistics(boundary, rows) if boundary in early else final
            values = {
                "loss": one.loss,
                "agreement": one.top == final.top,
                "kl_to_final": (
                    divergence(final.logprobs, one.logprobs, gather)
                    if boundary in early
                    else torch.zeros_like(one.loss)
                ),
                "confidence": one.confidence,
            }
            parts[boundary].append(torch.stack([values[name].double() for name in COLUMNS]).cpu())
    columns = {boundary: torch.cat(chunks, dim=1) for boundary, chunks in parts.items()}
    for boundary, found in columns.items():
        if not found.isfinite().all():
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
