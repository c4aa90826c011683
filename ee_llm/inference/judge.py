"""From the logits of judged rows to verdicts: does a token leave here, and which one is it.

Legend of shapes: r judged rows, v vocabulary.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.inference.policy import MEASURES, Measure
from ee_llm.inference.request import Sequence, Verdict
from ee_llm.inference.sampling import Sampling, draw


@dataclass(frozen=True)
class Question:
    """What an exit is asked about one row.

    threshold: the confidence at which its token leaves; 0: in any case. history: the tokens up to
    `position`, for a repetition penalty alone.
    """

    slot: int
    position: int
    threshold: float
    measure: Measure
    sampling: Sampling
    history: tuple[int, ...] = ()


def question(sequence: Sequence, position: int, segment: int) -> Question:
    """Return what the exit at the end of `segment` is asked about a row of a sequence."""
    request = sequence.request
    return Question(
        sequence.slot,
        position,
        sequence.threshold(segment),
        request.policy.measure,
        request.sampling,
        sequence.history(position),
    )


@torch.no_grad()
def judge(logits: Tensor, questions: Items[Question]) -> list[Verdict]:
    """Return a verdict for each row of logits [r, v], in their order.

    A row with a logit that is not finite gets a verdict that says so.
    """
    if not questions:
        return []
    if logits.dtype != torch.float64:
        logits = logits.float()  # of bfloat16 alone: a CPU finds its greatest element slowly
    finite = [True] * len(questions)
    if not torch.isfinite(logits.sum()):  # one NaN or infinity is enough, and a sum is quick
        rows = logits.isfinite().all(dim=-1)
        finite, logits = rows.tolist(), logits.masked_fill(~rows[:, None], 0.0)
    confidences = _confidences(logits, [question.measure for question in questions])
    left = [c >= one.threshold for c, one in zip(confidences, questions, strict=True)]
    tokens, logprobs = _tokens(logits, questions, [i for i, leaves in enumerate(left) if leaves])
    columns = zip(questions, left, tokens, confidences, logprobs, strict=True)
    verdicts = [
        Verdict(question.slot, question.position, leaves, token, confidence, logprob)
        for question, leaves, token, confidence, logprob in columns
    ]
    return _with_errors(verdicts, finite)


def is_short(questions: Items[Question]) -> bool:
    """Return whether `summaries` of the logits say all that is asked."""
    return all(
        one.measure == "max_probability"
        and one.sampling.temperature == 0.0
        and one.sampling.repetition_penalty == 1.0
        for one in questions
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


def judge_summaries(summaries: Tensor, questions: Items[Question]) -> list[Verdict]:
    """Return what `judge` does, from the summaries [r, 3 * ranks] of all shards, in their order.

    Of equal logits the lowest id wins. A row with NaN or plus infinity gets a verdict that says so.
    """
    if not questions:
        return []
    rows = summaries.isfinite().all(dim=-1)
    finite = rows.tolist()
    summaries = summaries.masked_fill(~rows[:, None], 0.0)
    top, total, place = summaries.unflatten(-1, (-1, 3)).unbind(-1)  # [r, ranks] each
    greatest, shard = top.max(dim=-1)
    logprobs = -(total * (top - greatest[:, None]).exp()).sum(dim=-1).log()
    tokens = place.gather(-1, shard[:, None])[:, 0].long().tolist()
    columns = zip(questions, tokens, logprobs.exp().tolist(), logprobs.tolist(), strict=True)
    verdicts = []
    for one, token, confidence, logprob in columns:
        left = confidence >= one.threshold
        said = (token, confidence, logprob) if left else (-1, confidence, 0.0)
        verdicts.append(Verdict(one.slot, one.position, left, *said))
    return _with_errors(verdicts, finite)


def _with_errors(verdicts: Items[Verdict], finite: Items[bool]) -> list[Verdict]:
    """Return the verdicts, those of rows whose logits are not finite replaced."""
    return [
        one if is_finite else Verdict(one.slot, one.position, True, -1, 0.0, 0.0, is_finite=False)
        for one, is_finite in zip(verdicts, finite, strict=True)
    ]


def _confidences(logits: Tensor, measures: list[Measure]) -> list[float]:
    """Return the confidence of each row by its own measure."""
    by_measure = {
        measure: MEASURES[measure](logits).tolist() for measure in dict.fromkeys(measures)
    }
    return [by_measure[measure][row] for row, measure in enumerate(measures)]


def _tokens(
    logits: Tensor, questions: Items[Question], leaving: list[int]
) -> tuple[list[int], list[float]]:
    """Return each leaving row's token and its log probability; -1 and 0 for the others."""
    tokens, logprobs = [-1] * len(questions), [0.0] * len(questions)
    if not leaving:
        return tokens, logprobs
    logits = logits if len(leaving) == len(questions) else logits[leaving]
    chosen = [questions[index] for index in leaving]
    drawn = draw(
        logits,
        [question.sampling for question in chosen],
        [question.position for question in chosen],
        [question.history for question in chosen],
    )
    logprob = logits.gather(-1, drawn[:, None])[:, 0] - logits.logsumexp(dim=-1)
    for index, token, value in zip(leaving, drawn.tolist(), logprob.tolist(), strict=True):
        tokens[index], logprobs[index] = token, value
    return tokens, logprobs
