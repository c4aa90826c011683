"""The certificate: one forward over a finished sequence checks every exit and every token of it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.errors import RequestError
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.sampling.sampler import sample, token_margin
from ee_llm.inference.verification.reference_decoding import (
    RequestOutput,
    finite_logits,
    policy_in_force,
    rows_left_at,
)


@dataclass(frozen=True)
class Divergence:
    """Where a finished sequence is not what its definition says.

    index: of the new token. kind: "exit", it left at another boundary than the first confident one;
    "token", its exit would have drawn another one. found, expected: boundaries or token ids. Under
    `propagate` one that left too early is expected at the final exit: where its row was frozen,
    what lies between can not be told.
    margin: the least error that explains it, in confidence ("exit": infinite if no error does) or
    in logits over the temperature ("token": see `token_margin`).
    """

    index: int
    kind: Literal["exit", "token"]
    found: int
    expected: int
    margin: float


@dataclass(frozen=True)
class Tolerance:
    """The greatest margins of a divergence that rounding explains: of a token, of an exit."""

    token: float
    exit: float

    def explains(self, divergence: Divergence) -> bool:
        """Return whether a divergence lies within the margin of its kind; within 0 lies none."""
        margin = self.token if divergence.kind == "token" else self.exit
        return 0.0 < margin >= divergence.margin


def tolerance(dtype: torch.dtype) -> Tolerance:
    """Return the margins for a dtype: 64 of its epsilons in logits, a quarter of it in confidence.

    A logit is some ten units large and the sum of rounded products of a rounded hidden state;
    d p / d logit = p (1 - p) is 1/4 at most. In float64 nothing is explained.
    """
    token = 0.0 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    return Tolerance(token, token / 4)


@torch.no_grad()
def verify_trace(model: ReferenceModel, generation: RequestOutput) -> list[Divergence]:
    """Return every divergence of `generation` from the teacher-forced definition: [] proves it.

    A token is held against the exit it claims (the expected one if the claimed one does not exist
    or is off), so that a wrong exit does not count twice. In float64 there must be no divergence;
    in lower precision the margins tell rounding from a mistake.
    Raises RequestError when the sequence or its policy does not fit the model.
    """
    policy = policy_in_force(model, generation.policy, generation.strategy)
    num_new = len(generation.tokens)
    if num_new == 0 or len(generation.prompt) == 0 or len(generation.exits) != num_new:
        raise RequestError(
            f"a prompt of {len(generation.prompt)} tokens, {num_new} new tokens and"
            f" {len(generation.exits)} exits are no finished sequence"
        )
    if not 0 <= generation.tokens[-1] < model.config.model.vocab_size:  # the one that is no row
        raise RequestError(
            f"token {generation.tokens[-1]} is beyond model.vocab_size ="
            f" {model.config.model.vocab_size}"
        )
    sequence = [*generation.prompt, *generation.tokens]
    rows = slice(len(generation.prompt) - 1, len(sequence) - 1)
    permitted = [exit for exit in policy.boundaries if policy.threshold(exit) is not None]
    # Under propagate a row says nothing beyond the exit it claims, if there is such an exit.
    last_exits = [model.num_layers] * num_new
    if generation.strategy == "propagate":
        last_exits = [e if e in permitted else model.num_layers for e in generation.exits]
    left_at = rows_left_at(model, len(generation.prompt), last_exits[:-1], generation.strategy)
    logits: dict[int, dict[int, Tensor]] = {}  # {boundary: {index: [v]}}
    confidences: dict[int, dict[int, float]] = {}
    for boundary, hidden in model.walk(torch.tensor(sequence[:-1]), left_at):
        if boundary in permitted or boundary == model.num_layers:
            indices = [index for index, last in enumerate(last_exits) if last >= boundary]
            values = finite_logits(model, boundary, hidden[rows][indices])
            logits[boundary] = dict(zip(indices, values, strict=True))
            if boundary in permitted:
                measured = policy.confidence(values).tolist()
                confidences[boundary] = dict(zip(indices, measured, strict=True))
    divergences = []
    for index, (token, found) in enumerate(zip(generation.tokens, generation.exits, strict=True)):
        at_exits = {exit: of[index] for exit, of in confidences.items() if index in of}
        leaving = [exit for exit, value in at_exits.items() if policy.leaves(exit, value)]
        expected = leaving[0] if leaving else model.num_layers
        if found != expected:
            margin = _exit_margin(policy, at_exits, found) if found in logits else math.inf
            divergences.append(Divergence(index, "exit", found, expected, margin))
        row, position = logits[found if found in logits else expected][index], rows.start + index
        history = sequence[: position + 1]
        drawn = sample(row, generation.sampling, position, history)
        if token != drawn:
            margin = token_margin(row, generation.sampling, position, token, history)
            divergences.append(Divergence(index, "token", token, drawn, margin))
    return divergences


def _exit_margin(policy: ExitPolicy, at_exits: dict[int, float], found: int) -> float:
    """Return the least error of the confidences that explains leaving at `found`.

    Every shallower exit must fall under its threshold, and `found` must rise to its own.
    """
    over = {exit: value - (policy.threshold(exit) or 0.0) for exit, value in at_exits.items()}
    errors = [value for exit, value in over.items() if exit < found] + [-over.get(found, 0.0)]
    return max(0.0, *errors)
