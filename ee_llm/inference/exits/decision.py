"""Decide from logits whether a row exits, and which token it draws.

Legend of shapes: r rows, v vocabulary.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ee_llm.inference.choices import HIDDEN_MEASURES, Measure, logit_measure
from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.exits.confidence import OF_LOGITS, agreement, candidates, shortlist
from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import draw, mask_banned
from ee_llm.inference.scheduling.output import HiddenQuery
from ee_llm.inference.sequence import Sequence


@dataclass(frozen=True)
class ExitQuery:
    """A row that an exit decides about.

    Attributes:
        slot: Slot of the row's sequence.
        position: Position of the row.
        threshold: Least confidence that exits; 0 always exits.
        measure: Measure of confidence.
        sampling_params: How the token is drawn.
        history: Distinct tokens up to `position`, only for a repetition penalty.
        banned: Ids that may not be drawn.
        contrast: Settings by which the logits are contrasted with early ones before the decision.
        predicted: Token ids that a shallower exit predicted, for the measures that compare exits.
        confidence: The confidence, if it is known before the logits.
    """

    slot: int
    position: int
    threshold: float
    measure: Measure
    sampling_params: SamplingParams
    history: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    contrast: Contrast | None = None
    predicted: tuple[int, ...] = ()
    confidence: float | None = None


def make_query(sequence: Sequence, position: int, segment: int) -> ExitQuery:
    """Return the query of a sequence's row at the exit at the end of `segment`."""
    request = sequence.request
    return ExitQuery(
        sequence.slot,
        position,
        sequence.threshold(segment),
        sequence.measure(segment),
        request.sampling_params,
        sequence.history(position),
        sequence.banned(position),
        request.contrast,
        sequence.predicted,
    )


def split_by_confidence(
    queries: Items[ExitQuery], confidences: Mapping[int, float]
) -> tuple[dict[int, ExitResult], list[ExitQuery]]:
    """Return the results of the rows that do not need logits, and the queries of the others.

    Args:
        queries: One query per row.
        confidences: Confidences that are known before the logits, by number of the row.

    Returns:
        The results of rows whose confidence is below the threshold, by number of the row, and the
        other queries in order.
    """
    declined: dict[int, ExitResult] = {}
    others = []
    for row, query in enumerate(queries):
        confidence = confidences.get(row)
        if confidence is None or confidence >= query.threshold:
            others.append(replace(query, confidence=confidence))
        else:
            declined[row] = _declined(query, confidence, query.predicted)
    return declined, others


def join_results(declined: Mapping[int, ExitResult], others: Items[ExitResult]) -> list[ExitResult]:
    """Return the results of all rows in order, from what `split_by_confidence` separated."""
    remaining = iter(others)
    count = len(declined) + len(others)
    return [declined[row] if row in declined else next(remaining) for row in range(count)]


@torch.no_grad()
def decide_exits(logits: Tensor, queries: Items[ExitQuery]) -> list[ExitResult]:
    """Return the result of each query, in order.

    Args:
        logits: Logits [r, v] of the queried rows. A row with a logit that is not finite gets a
            result with `is_finite` False.
        queries: One query per row.
    """
    if not queries:
        return []
    if logits.dtype != torch.float64:
        logits = logits.float()  # A CPU finds the maximum of bfloat16 slowly.
    finite = [True] * len(queries)
    if not torch.isfinite(logits.sum()):  # The sum is not finite if any logit is not; it is quick.
        rows = logits.isfinite().all(dim=-1)
        finite, logits = rows.tolist(), logits.masked_fill(~rows[:, None], 0.0)
    confidences, predicted = _confidences(logits, queries)
    exited = [c >= query.threshold for c, query in zip(confidences, queries, strict=True)]
    drawn = _draw(logits, queries, [row for row, exits in enumerate(exited) if exits])
    results = []
    for row, query in enumerate(queries):
        if not finite[row]:
            results.append(_non_finite(query))
        elif row not in drawn:
            results.append(_declined(query, confidences[row], predicted.get(row, ())))
        else:
            token, logprob, top = drawn[row]
            results.append(
                ExitResult(
                    query.slot, query.position, True, token, confidences[row], logprob, True, top
                )
            )
    return results


def can_decide_from_summaries(
    queries: Items[ExitQuery], hidden_queries: Items[HiddenQuery] = ()
) -> bool:
    """Return whether `summarize` gives all that the queries need.

    hidden_queries: those of the queries whose confidence is known before the logits.
    """
    is_known = {hidden.row for hidden in hidden_queries}
    return all(
        (query.measure == "max_probability" or row in is_known)
        and query.sampling_params.is_plain_greedy
        and not query.banned
        and not query.sampling_params.logprobs
        and query.contrast is None
        for row, query in enumerate(queries)
    )


def summarize(logits: Tensor, first_id: int) -> Tensor:
    """Return the greatest logit m, the sum of exp(logit - m) and the id of m, [r, 3], of a shard.

    A row takes 12 bytes, unless logits are float64.

    Args:
        logits: Logits [r, v / ranks] of the ids from `first_id` on.
        first_id: Vocabulary id of the first column.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[0] == 0:
        return logits.new_empty(0, 3)
    top, place = logits.max(dim=-1)
    total = (logits - top[:, None]).exp().sum(dim=-1)
    return torch.stack([top, total, (place + first_id).to(top.dtype)], dim=-1)


def decide_from_summaries(summaries: Tensor, queries: Items[ExitQuery]) -> list[ExitResult]:
    """Return what `decide_exits` returns, from the summaries [r, 3 * ranks] of all shards in order.

    Of equal logits the lowest id wins. A row with NaN or infinity gets a result with `is_finite`
    False.
    """
    if not queries:
        return []
    rows = summaries.isfinite().all(dim=-1)
    finite = rows.tolist()
    summaries = summaries.masked_fill(~rows[:, None], 0.0)
    top, total, place = summaries.unflatten(-1, (-1, 3)).unbind(-1)  # [r, ranks] each
    greatest, shard = top.max(dim=-1)
    logprobs = -(total * (top - greatest[:, None]).exp()).sum(dim=-1).log()
    tokens = place.gather(-1, shard[:, None])[:, 0].long().tolist()
    columns = zip(queries, tokens, logprobs.exp().tolist(), logprobs.tolist(), finite, strict=True)
    results = []
    for query, token, confidence, logprob, is_finite in columns:
        if not is_finite:
            results.append(_non_finite(query))
            continue
        if query.confidence is not None:
            confidence = query.confidence
        if confidence >= query.threshold:
            results.append(ExitResult(query.slot, query.position, True, token, confidence, logprob))
        else:
            results.append(_declined(query, confidence))
    return results


def _non_finite(query: ExitQuery) -> ExitResult:
    return ExitResult(query.slot, query.position, True, -1, 0.0, 0.0, is_finite=False)


def _declined(query: ExitQuery, confidence: float, predicted: tuple[int, ...] = ()) -> ExitResult:
    return ExitResult(query.slot, query.position, False, -1, confidence, 0.0, predicted=predicted)


def _confidences(
    logits: Tensor, queries: Items[ExitQuery]
) -> tuple[list[float], dict[int, tuple[int, ...]]]:
    """Return the confidence of each row by its own measure, and what deeper exits need of rows."""
    confidences = [0.0 if query.confidence is None else query.confidence for query in queries]
    predicted: dict[int, tuple[int, ...]] = {}
    by_measure: dict[Measure, list[int]] = {}
    for row, query in enumerate(queries):
        if query.confidence is None:
            by_measure.setdefault(query.measure, []).append(row)
    for measure, rows in by_measure.items():
        part = logits if len(rows) == len(queries) else logits[rows]
        if measure == "agreement":
            before = [queries[row].predicted[0] if queries[row].predicted else -1 for row in rows]
            values = agreement(part, torch.tensor(before, device=part.device))
            top = part.argmax(dim=-1).tolist()
            predicted |= {row: (token,) for row, token in zip(rows, top, strict=True)}
        elif measure == "shortlist":
            ids = candidates(part)
            values = shortlist(part.gather(-1, ids))
            predicted |= {row: tuple(of) for row, of in zip(rows, ids.tolist(), strict=True)}
        else:
            assert measure not in HIDDEN_MEASURES, "it is computed before the logits"
            values = OF_LOGITS[logit_measure(measure)](part)
        for row, value in zip(rows, values.tolist(), strict=True):
            confidences[row] = value
    return confidences, predicted


def _draw(
    logits: Tensor, queries: Items[ExitQuery], rows: list[int]
) -> dict[int, tuple[int, float, tuple[tuple[int, float], ...]]]:
    """Return the token, its log probability and the most probable tokens of each given row."""
    if not rows:
        return {}
    logits = logits if len(rows) == len(queries) else logits[rows]
    exiting = [queries[row] for row in rows]
    tokens = draw(
        mask_banned(logits, [query.banned for query in exiting]),
        [query.sampling_params for query in exiting],
        [query.position for query in exiting],
        [query.history for query in exiting],
    )
    total = logits.logsumexp(dim=-1)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - total
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    for index, query in enumerate(exiting):
        if query.sampling_params.logprobs:
            tops[index] = _top_logprobs(
                logits[index] - total[index], query.sampling_params.logprobs
            )
    columns = zip(rows, tokens.tolist(), logprobs.tolist(), tops, strict=True)
    return {row: (token, logprob, top) for row, token, logprob, top in columns}


def _top_logprobs(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return the ids and log probabilities of the `count` most probable tokens of a row [v]."""
    top = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
