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
from ee_llm.evaluation.measure import MAX_LOGITS
from ee_llm.evaluation.row_statistics import row_statistics
from ee_llm.inference.execution.teacher_forced import TeacherForced

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


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
    """The share of tokens that are the full model's, with its 95 % confidence interval."""

    value: float
    low: float
    high: float


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


def agreement_of(scores: Sequence[TokenScores]) -> Agreement:
    """Return the share of tokens that agree, over all generations.

    Tokens of one generation are correlated, so the number of tokens is divided by the design effect
    (Kish, Survey Sampling, 1965): the variance between generations over that of independent
    tokens, if it is above 1. The interval is Wilson's (1927), which has a width even if all tokens
    agree; in this case the design effect is not known and tokens count as independent.
    """
    count = sum(one.num_tokens for one in scores)
    share = sum(one.num_agreeing for one in scores) / count
    independent = share * (1 - share) / count
    effect = 1.0
    if independent > 0 and len(scores) > 1:
        residuals = ((one.num_agreeing - share * one.num_tokens) ** 2 for one in scores)
        clustered = len(scores) / (len(scores) - 1) * math.fsum(residuals) / count**2
        effect = max(1.0, clustered / independent)
    size = count / effect
    center = (share + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z * math.sqrt(share * (1 - share) / size + _Z**2 / (4 * size**2)) / (1 + _Z**2 / size)
    low, high = max(0.0, center - half), min(1.0, center + half)
    return Agreement(share, min(low, share), max(high, share))


def pooled(scores: Sequence[TokenScores]) -> tuple[Agreement, float]:
    """Return the agreement of generations, and their mean loss per token in nats."""
    loss = math.fsum(one.loss for one in scores) / sum(one.num_tokens for one in scores)
    return agreement_of(scores), loss
