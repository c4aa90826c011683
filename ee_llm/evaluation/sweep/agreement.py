"""How many generated tokens are those of the full model, teacher-forced, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.tensors import take_tensors
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.evaluation.averages import ratio_of_sums, student_quantile
from ee_llm.evaluation.measure import MAX_LOGITS
from ee_llm.evaluation.row_statistics import row_statistics
from ee_llm.inference.execution.teacher_forced import TeacherForced

LEAST_CORRELATION = 0.05
"""Correlation of the tokens of a generation that is assumed at least, since a few disagreements do
not show less."""


class TokenScores(NamedTuple):
    """What the full model says about the tokens of one generation.

    Attributes:
        num_tokens: Number of generated tokens.
        num_agreeing: Number of them that are the full model's most probable token, given the
            prompt and the generated tokens before it.
        loss: Sum of their negative log probabilities under the full model, in nats.
    """

    num_tokens: int
    num_agreeing: int
    loss: float


@dataclass(frozen=True)
class Agreement:
    """The share of tokens that are the full model's, with its 95 % confidence interval.

    A single generation has none: its tokens do not show how much generations differ.
    """

    value: float
    low: float | None
    high: float | None


class FullModel:
    """Scores generations with the model at full depth, in one pass over each distinct one."""

    def __init__(self, reader: TensorReader, dtype: torch.dtype, max_length: int) -> None:
        """Load the model in this process; `max_length` tokens are the longest sequence."""
        config = reader.config()
        tensors = take_tensors(config, CheckpointTensors(reader), dtype, distributed.device())
        self._model = TeacherForced(config, tensors, max_length)
        self._projection = self._model.projection(config.model.num_layers)
        self._scores: dict[tuple[tuple[int, ...], tuple[int, ...]], TokenScores] = {}

    def score(self, prompt: tuple[int, ...], generated: tuple[int, ...]) -> TokenScores:
        """Return the scores of the tokens generated after a prompt."""
        key = prompt, generated
        if key not in self._scores:
            self._scores[key] = self._compute(prompt, generated)
        return self._scores[key]

    @torch.no_grad()
    def _compute(self, prompt: tuple[int, ...], generated: tuple[int, ...]) -> TokenScores:
        tokens = torch.tensor([*prompt, *generated])
        *_, last = self._model(tokens[:-1])
        features = last.features()[len(prompt) - 1 :]
        targets = tokens[len(prompt) :].to(features.device)
        num_rows = max(1, MAX_LOGITS // self._model.num_logits)
        num_agreeing, loss = 0, 0.0
        for rows in torch.arange(len(targets), device=targets.device).split(num_rows):
            logits = self._projection(features[rows])
            found = row_statistics(logits, targets[rows], self._model.first_id, _alone)
            num_agreeing += int((found.top == targets[rows]).sum())
            loss += float(found.loss.double().sum())
        return TokenScores(len(generated), num_agreeing, loss)


def _alone(part: Tensor) -> Tensor:
    return part


class _Spread(NamedTuple):
    """The agreement of generations, and its variance.

    Attributes:
        share: Share of tokens that agree.
        independent: Variance of `share` if tokens were independent.
        clustered: Variance from the differences between generations.
        size: Mean number of tokens of the generation of a token.
    """

    share: float
    independent: float
    clustered: float
    size: float


def _spread(scores: Sequence[TokenScores]) -> _Spread:
    counts = [one.num_tokens for one in scores]
    share, clustered = ratio_of_sums([one.num_agreeing for one in scores], counts)
    independent = share * (1 - share) / sum(counts)
    return _Spread(share, independent, clustered, sum(n**2 for n in counts) / sum(counts))


def correlation_of(points: Sequence[Sequence[TokenScores]]) -> float:
    """Return the correlation of the tokens of a generation, over all points of a sweep.

    It is pooled because a point that almost always agrees hardly shows it, and it is at least
    `LEAST_CORRELATION`.

    Args:
        points: The generations of each point.
    """
    spreads = [_spread(scores) for scores in points if len(scores) > 1]
    excess = math.fsum(one.clustered - one.independent for one in spreads)
    unit = math.fsum(one.independent * (one.size - 1) for one in spreads)
    return max(LEAST_CORRELATION, excess / unit) if unit > 0 else LEAST_CORRELATION


def agreement_of(scores: Sequence[TokenScores], correlation: float) -> Agreement:
    """Return the share of tokens that agree, over all generations.

    Tokens of one generation are correlated, so the number of tokens is divided by the design effect
    (Kish, Survey Sampling, 1965): that of these generations, or of `correlation` if it is larger.
    The interval is Wilson's (1927), which has a width even if all tokens agree, with the quantile
    of Student's distribution, since generations show the variance.

    Args:
        scores: The generations.
        correlation: Correlation of the tokens of a generation; see `correlation_of`.
    """
    count = sum(one.num_tokens for one in scores)
    share, independent, clustered, size = _spread(scores)
    if len(scores) == 1:
        return Agreement(share, None, None)
    own = clustered / independent if independent > 0 else 1.0
    effective = count / max(1.0, own, 1 + correlation * (size - 1))
    t = student_quantile(len(scores) - 1)
    center = (share + t**2 / (2 * effective)) / (1 + t**2 / effective)
    variance = share * (1 - share) / effective + t**2 / (4 * effective**2)
    half = t * math.sqrt(variance) / (1 + t**2 / effective)
    low, high = max(0.0, center - half), min(1.0, center + half)
    return Agreement(share, min(low, share), max(high, share))


def mean_loss(scores: Sequence[TokenScores]) -> float:
    """Return the mean loss of a token over all generations, in nats."""
    return math.fsum(one.loss for one in scores) / sum(one.num_tokens for one in scores)
