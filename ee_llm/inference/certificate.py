"""The certificate: one forward over a finished sequence checks every exit and every token of it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ee_llm.inference.generator import Generation, finite_logits, policy_in_force
from ee_llm.inference.reference import ReferenceModel
from ee_llm.inference.sampling import sample, token_margin


@dataclass(frozen=True)
class Divergence:
    """Where a finished sequence is not what its definition says.

    index: of the new token. kind: "exit", it left at another boundary than the first confident one;
    "token", its exit would have drawn another one. found, expected: boundaries or token ids.
    margin: the least error that explains it, in confidence ("exit": infinite if no error does) or
    in logits over the temperature ("token": see `token_margin`).
    """

    index: int
    kind: Literal["exit", "token"]
    found: int
    expected: int
    margin: float


@torch.no_grad()
def verify_trace(model: ReferenceModel, generation: Generation) -> list[Divergence]:
    """Return every divergence of `generation` from the teacher-forced definition: [] proves it.

    A token is held against the exit it claims, so that a wrong exit does not count twice. In
    float64 there must be none; in lower precision the margins tell rounding from a mistake.
    Raises ValueError when the sequence or its policy does not fit the model.
    """
    policy = policy_in_force(model, generation.policy, generation.strategy)
    num_new = len(generation.tokens)
    if num_new == 0 or len(generation.prompt) == 0 or len(generation.exits) != num_new:
        raise ValueError(
            f"a prompt of {len(generation.prompt)} tokens, {num_new} new tokens and"
            f" {len(generation.exits)} exits are no finished sequence"
        )
    if not 0 <= generation.tokens[-1] < model.config.model.vocab_size:  # the one that is no row
        raise ValueError(
            f"token {generation.tokens[-1]} is beyond model.vocab_size ="
            f" {model.config.model.vocab_size}"
        )
    sequence = torch.tensor([*generation.prompt, *generation.tokens])
    rows = slice(len(generation.prompt) - 1, len(sequence) - 1)
    logits = {
        boundary: finite_logits(model, boundary, hidden[rows])  # [new tokens, v]
        for boundary, hidden in model.walk(sequence[:-1])
    }
    confidences = {boundary: policy.confidence(logits[boundary]) for boundary in policy.boundaries}
    divergences = []
    for index, (token, found) in enumerate(zip(generation.tokens, generation.exits, strict=True)):
        at_exits = {boundary: float(row[index]) for boundary, row in confidences.items()}
        leaving = [exit for exit in policy.boundaries if policy.leaves(exit, at_exits[exit])]
        expected = leaving[0] if leaving else model.num_layers
        if found != expected:
            errors = [
                _error(policy.threshold(exit), at_exits[exit], exit, found) for exit in at_exits
            ]
            margin = max(errors) if found in logits else math.inf
            divergences.append(Divergence(index, "exit", found, expected, margin))
        row, position = logits[found if found in logits else expected][index], rows.start + index
        drawn = sample(row, generation.sampling, position)
        if token != drawn:
            margin = token_margin(row, generation.sampling, position, token)
            divergences.append(Divergence(index, "token", token, drawn, margin))
    return divergences


def _error(threshold: float | None, confidence: float, exit: int, found: int) -> float:
    """Return the error of the confidence at `exit` that leaving at `found` would take."""
    if exit > found or (threshold is None and exit < found):
        return 0.0
    if threshold is None:
        return math.inf
    return max(0.0, threshold - confidence if exit == found else confidence - threshold)
