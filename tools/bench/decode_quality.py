"""Evaluate decoded text: agreement with the dense model, the certificate, and controls.

All evaluations are teacher-forced, with the reference model in float64.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.verification.certificate import Divergence, Tolerance, verify_trace
from tools.bench.decode_model import Model, Weights, truncate

# The minimum agreement with the dense model when thresholds are chosen automatically.
MIN_AGREEMENT = 0.95


@dataclass(frozen=True)
class Certificate:
    """The result of checking some generations.

    Attributes:
        num_tokens: The number of checked tokens.
        num_divergent: The number of tokens with a divergence.
        largest_token: The largest margin of a token, in logits.
        largest_exit: The largest margin of an exit, in confidence.
        num_generations: The number of checked generations.
        num_passed: The number of generations in which the tolerance explains every divergence.
    """

    num_tokens: int
    num_divergent: int
    largest_token: float
    largest_exit: float
    num_generations: int
    num_passed: int


class Dense:
    """The dense model and its exits in float64. Results are cached by sequence."""

    def __init__(self, model: Model) -> None:
        self.reference = ReferenceModel(model.config, model.tensors, torch.float64)
        self._choices = lru_cache(maxsize=None)(self._choose)
        self._divergences: dict[tuple[object, ...], list[Divergence]] = {}

    def agreement(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """Return the share of tokens that the dense model would choose after the same text."""
        choices = self._choices(prompt, tokens)
        return statistics.mean(a == b for a, b in zip(choices, tokens, strict=True))

    def certify(self, generations: Sequence[RequestOutput], tolerance: Tolerance) -> Certificate:
        """Check generations with `verify_trace`, each token given the recorded text before it."""
        found = [self._verify(generation) for generation in generations]
        margins: dict[str, list[float]] = {"token": [0.0], "exit": [0.0]}
        for divergence in (d for one in found for d in one):
            margins[divergence.kind].append(divergence.margin)
        return Certificate(
            sum(len(generation.token_ids) for generation in generations),
            sum(len({divergence.index for divergence in one}) for one in found),
            max(margins["token"]),
            max(margins["exit"]),
            len(found),
            sum(all(map(tolerance.explains, one)) for one in found),
        )

    @torch.no_grad()
    def _choose(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...]:
        sequence = torch.tensor([*prompt, *tokens[:-1]])
        *_, (boundary, hidden) = self.reference.walk(sequence)
        logits = self.reference.logits(boundary, hidden[len(prompt) - 1 :])
        return tuple(logits.argmax(-1).tolist())

    def _verify(self, made: RequestOutput) -> list[Divergence]:
        # Batches of different sizes repeat the same generations.
        key = (
            made.prompt_token_ids,
            made.token_ids,
            made.exits,
            made.policy,
            made.strategy == "propagate",
        )
        if key not in self._divergences:
            self._divergences[key] = verify_trace(self.reference, made)
        return self._divergences[key]


def common_prefix(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of equal leading tokens."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


@dataclass(frozen=True)
class Choices:
    """The top token and the confidence of each exit on the same rows.

    Attributes:
        tokens: By boundary, [rows]; the final exit is last.
        confidences: By boundary, [rows]; the final exit is last.
    """

    tokens: dict[int, Tensor]
    confidences: dict[int, Tensor]


@torch.no_grad()
def exit_choices(
    reference: ReferenceModel, sequences: Sequence[Sequence[int]], num_prompt: int
) -> Choices:
    """Return the choices of all exits on the rows of `sequences` that follow the prompt."""
    policy = make_exit_policy(reference.boundaries[:-1], [None])
    tokens: dict[int, list[Tensor]] = {boundary: [] for boundary in reference.boundaries}
    confidences: dict[int, list[Tensor]] = {boundary: [] for boundary in reference.boundaries}
    for sequence in sequences:
        for boundary, hidden in reference.walk(torch.tensor(sequence[:-1])):
            logits = reference.logits(boundary, hidden[num_prompt - 1 :])
            tokens[boundary].append(logits.argmax(-1))
            confidences[boundary].append(policy.confidence(logits))
    return Choices(
        {boundary: torch.cat(found) for boundary, found in tokens.items()},
        {boundary: torch.cat(found) for boundary, found in confidences.items()},
    )


def exits_taken(choices: Choices, policy: ExitPolicy) -> Tensor:
    """Return the boundary [rows] of the first confident exit of each row."""
    *early, last = choices.tokens
    exits = torch.full_like(choices.tokens[last], last)
    for boundary in reversed(early):
        threshold = policy.threshold(boundary)
        if threshold is not None:
            exits[choices.confidences[boundary] >= threshold] = boundary
    return exits


def agreement(choices: Choices, exits: Tensor) -> float:
    """Return the share of rows whose exit chooses the same token as the final exit.

    Args:
        choices: The choices of all exits.
        exits: The boundary of each row's exit, [rows].
    """
    dense = next(reversed(choices.tokens.values()))
    counts = (float((own == dense)[exits == b].sum()) for b, own in choices.tokens.items())
    return sum(counts) / len(exits)


def calibrate(
    choices: Choices, weights: Weights, min_agreement: float = MIN_AGREEMENT
) -> ExitPolicy:
    """Return the cheapest policy that agrees with the dense model often enough.

    The candidates use one or two exits, with one threshold in hundredths for both. The cost is the
    number of weights that a token is multiplied by. If no candidate saves anything, all exits are
    off.
    """
    *early, last = choices.tokens
    off = make_exit_policy(early, [None])
    best, least_cost = off, float(weights.layer * last + weights.heads[last])
    for used in [*combinations(early, 1), *combinations(early, 2)]:
        for hundredths in range(1, 100):
            thresholds = [hundredths / 100 if boundary in used else None for boundary in early]
            policy = make_exit_policy(early, thresholds)
            exits = exits_taken(choices, policy)
            cost = weights.layer * float(exits.double().mean())
            for boundary in (*used, last):
                cost += weights.heads[boundary] * float((exits >= boundary).double().mean())
            if cost < least_cost and agreement(choices, exits) >= min_agreement:
                best, least_cost = policy, cost
    return best


@dataclass(frozen=True)
class Control:
    """A way to choose exits: the text it was tried on, its mean depth and dense agreement."""

    name: str
    text: str
    mean_depth: float
    agreement: float


def controls(choices: Choices, policy: ExitPolicy, text: str) -> list[Control]:
    """Return exits by confidence, the same number of exits at random rows, and each exit alone.

    The agreement at random rows is the mean over all ways to distribute the exits to the rows.
    """
    exits = exits_taken(choices, policy)
    alone = {b: agreement(choices, torch.full_like(exits, b)) for b in choices.tokens}
    at_random = sum(float((exits == b).double().mean()) * own for b, own in alone.items())
    depth = float(exits.double().mean())
    return [
        Control("exits by confidence", text, depth, agreement(choices, exits)),
        Control("exits at random rows", text, depth, at_random),
        *(Control(f"all at exit {b}", text, float(b), alone[b]) for b in policy.boundaries),
    ]


def all_controls(
    model: Model,
    reference: ReferenceModel,
    policy: ExitPolicy,
    texts: Mapping[str, Sequence[Sequence[int]]],
    num_prompt: int,
) -> list[Control]:
    """Return the controls on each named text, after `num_prompt` tokens.

    The last control of each text is the model truncated to the mean depth of exits on the first
    text.
    """
    found: list[Control] = []
    for text, sequences in texts.items():
        choices = exit_choices(reference, sequences, num_prompt)
        found += controls(choices, policy, text)
        depth = depth_of(found[0])
        shorter = truncate(model, depth)
        truncated = ReferenceModel(shorter.config, shorter.tensors, torch.float64)
        tokens = exit_choices(truncated, sequences, num_prompt).tokens[depth]
        is_right = tokens == next(reversed(choices.tokens.values()))
        share = float(is_right.double().mean())
        found.append(Control(f"truncated to {depth} layers", text, float(depth), share))
    return found


def depth_of(control: Control) -> int:
    """Return the mean depth of a control, rounded to whole layers."""
    return max(1, math.floor(control.mean_depth + 0.5))
