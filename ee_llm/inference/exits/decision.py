"""From the logits of judged rows to verdicts: does a token leave here, and which one is it.

Legend of shapes: r judged rows, v vocabulary.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.inference.exits.policy import MEASURES, Measure
from ee_llm.inference.request import ExitResult, Sequence
from ee_llm.inference.sampling.sampler import SamplingParams, draw


@dataclass(frozen=True)
class ExitQuery:
    """What an exit is asked about one row.

    threshold: the confidence at which its token leaves; 0: in any case. history: the tokens up to
    `position`, for a repetition penalty alone.
    """

    slot: int
    position: int
    threshold: float
    measure: Measure
    sampling: SamplingParams
    history: tuple[int, ...] = ()


def make_query(sequence: Sequence, position: int, segment: int) -> ExitQuery:
    """Return what the exit at the end of `segment` is asked about a row of a sequence."""
    request = sequence.request
    return ExitQuery(
        sequence.slot,
        position,
        sequence.threshold(segment),
        request.policy.measure,
        request.sampling,
        sequence.history(position),
    )


@torch.no_grad()
def decide_exits(logits: Tensor, queries: Items[ExitQuery]) -> list[ExitResult]:
    """Return a verdict for each row of logits [r, v], in their order.

    A row with a logit that is not finite gets a verdict that says so.
    """
    if not queries:
        return []
    if logits.dtype != torch.float64:
        logits = logits.float()  # of bfloat16 alone: a CPU finds its greatest element slowly
    finite = [True] * len(queries)
    if not torch.isfinite(logits.sum()):  # one NaN or infinity is enough, and a sum is quick
        rows = logits.isfinite().all(dim=-1)
        finite, logits = rows.tolist(), logits.masked_fill(~rows[:, None], 0.0)
    confidences = _confidences(logits, [make_query.measure for make_query in queries])
    left = [c >= one.threshold for c, one in zip(confidences, queries, strict=True)]
    tokens, logprobs = _tokens(logits, queries, [i for i, leaves in enumerate(left) if leaves])
    columns = zip(queries, left, tokens, confidences, logprobs, strict=True)
    results = [
        ExitResult(make_query.slot, make_query.position, leaves, token, confidence, logprob)
        for make_query, leaves, token, confidence, logprob in columns
    ]
    return _with_errors(results, finite)


def is_short(queries: Items[ExitQuery]) -> bool:
    """Return whether `summaries` of the logits say all that is asked."""
    return all(
        one.measure == "max_probability"
        and one.sampling.temperature == 0.0
        and one.sampling.repetition_penalty == 1.0
        for one in queries
    )


def summarize(logits: Tensor, first: int) -> Tensor:
    """Return greatest logit m, sum of exp(logit - m) and the greatest's id [r, 3] of a shard.

    logits [r, v / ranks]: of the ids from `first` on. Twelve bytes a row, where logits are not
    float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[0] == 0:
        return logits.new_empty(0, 3)
    top, place = logits.max(dim=-1)
    total = (logits - top[:, None]).exp().sum(dim=-1)
    return torch.stack([top, total, (place + first).to(top.dtype)], dim=-1)


def decide_from_summaries(summaries: Tensor, queries: Items[ExitQuery]) -> list[ExitResult]:
    """Return what `decide_exits` does, from the summaries [r, 3 * ranks] of all shards in order.

    Of equal logits the lowest id wins. A row with NaN or plus infinity gets a verdict that says so.
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
    columns = zip(queries, tokens, logprobs.exp().tolist(), logprobs.tolist(), strict=True)
    results = []
    for one, token, confidence, logprob in columns:
        left = confidence >= one.threshold
        said = (token, confidence, logprob) if left else (-1, confidence, 0.0)
        results.append(ExitResult(one.slot, one.position, left, *said))
    return _with_errors(results, finite)


def _with_errors(results: Items[ExitResult], finite: Items[bool]) -> list[ExitResult]:
    """Return the verdicts, those of rows whose logits are not finite replaced."""
    return [
        one
        if is_finite
        else ExitResult(one.slot, one.position, True, -1, 0.0, 0.0, is_finite=False)
        for one, is_finite in zip(results, finite, strict=True)
    ]


def _confidences(logits: Tensor, measures: list[Measure]) -> list[float]:
    """Return the confidence of each row by its own measure."""
    by_measure = {
        measure: MEASURES[measure](logits).tolist() for measure in dict.fromkeys(measures)
    }
    return [by_measure[measure][row] for row, measure in enumerate(measures)]


def _tokens(
    logits: Tensor, queries: Items[ExitQuery], leaving: list[int]
) -> tuple[list[int], list[float]]:
    """Return each leaving row's token and its log probability; -1 and 0 for the others."""
    tokens, logprobs = [-1] * len(queries), [0.0] * len(queries)
    if not leaving:
        return tokens, logprobs
    logits = logits if len(leaving) == len(queries) else logits[leaving]
    chosen = [queries[index] for index in leaving]
    drawn = draw(
        logits,
        [make_query.sampling for make_query in chosen],
        [make_query.position for make_query in chosen],
        [make_query.history for make_query in chosen],
    )
    logprob = logits.gather(-1, drawn[:, None])[:, 0] - logits.logsumexp(dim=-1)
    for index, token, value in zip(leaving, drawn.tolist(), logprob.tolist(), strict=True):
        tokens[index], logprobs[index] = token, value
    return tokens, logprobs
