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
    is_penalised = request.sampling.repetition_penalty != 1.0
    history = tuple(sequence.tokens[: position + 1]) if is_penalised else ()
    return Question(
        sequence.slot,
        position,
        sequence.threshold(segment),
        request.policy.measure,
        request.sampling,
        history,
    )


@torch.no_grad()
def judge(logits: Tensor, questions: Items[Question]) -> list[Verdict]:
    """Return a verdict for each row of logits [r, v], in their order.

    Raises ValueError where a logit is not finite.
    """
    if not questions:
        return []
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"an exit gives logits that are not finite in {logits.dtype}; are the weights damaged,"
            " or is this dtype too narrow for them?"
        )
    confidences = _confidences(logits, [question.measure for question in questions])
    left = [c >= one.threshold for c, one in zip(confidences, questions, strict=True)]
    tokens, logprobs = _tokens(logits, questions, [i for i, leaves in enumerate(left) if leaves])
    columns = zip(questions, left, tokens, confidences, logprobs, strict=True)
    return [
        Verdict(question.slot, question.position, leaves, token, confidence, logprob)
        for question, leaves, token, confidence, logprob in columns
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
    precise = logits if logits.dtype == torch.float64 else logits.float()
    logprob = precise.gather(-1, drawn[:, None])[:, 0] - precise.logsumexp(dim=-1)
    for index, token, value in zip(leaving, drawn.tolist(), logprob.tolist(), strict=True):
        tokens[index], logprobs[index] = token, value
    return tokens, logprobs
