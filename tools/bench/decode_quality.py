"""How good decoded text is: agreement with the dense model, the certificate, and controls.

All is judged by the plain reference model in float64, teacher-forced.
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

# So many tokens must be the dense model's own choice, where thresholds are not given.
LEAST_AGREEMENT = 0.95


@dataclass(frozen=True)
class Certificate:
    """What the certificate says about some generations.

    num_divergent: tokens with any divergence. largest_token, largest_exit: greatest margins, in
    logits and in confidence. num_passed: generations whose divergences are all within tolerance.
    """

    num_tokens: int
    num_divergent: int
    largest_token: float
    largest_exit: float
    num_generations: int
    num_passed: int


class Dense:
    """The dense model and its exits in float64; what it has said of a sequence it remembers."""

    def __init__(self, model: Model) -> None:
        self.reference = ReferenceModel(model.config, model.tensors, torch.float64)
        self._choices = lru_cache(maxsize=None)(self._choose)
        self._divergences: dict[tuple[object, ...], list[Divergence]] = {}

    def agreement(self, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """Return the share of tokens that the dense model would choose after those before them."""
        choices = self._choices(prompt, tokens)
        return statistics.mean(a == b for a, b in zip(choices, tokens, strict=True))

    def certify(self, generations: Sequence[RequestOutput], tolerance: Tolerance) -> Certificate:
        """Return what `verify_trace` finds; after a divergence the rest is judged by itself."""
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
        # Batches of other sizes make the same generation again and again.
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
    """Return how many leading tokens are equal."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))


@dataclass(frozen=True)
class Choices:
    """What each exit says on the same rows: its choice, and how sure it is of it.

    tokens, confidences: by boundary, [rows]; the final exit is the last.
    """

    tokens: dict[int, Tensor]
    confidences: dict[int, Tensor]


@torch.no_grad()
def choices(
    reference: ReferenceModel, sequences: Sequence[Sequence[int]], num_prompt: int
) -> Choices:
    """Return what all exits say on the rows of `sequences` that follow the prompt."""
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


def exits_taken(said: Choices, policy: ExitPolicy) -> Tensor:
    """Return the boundary [rows] that each row leaves at: the first that is confident."""
    *early, last = said.tokens
    at = torch.full_like(said.tokens[last], last)
    for boundary in reversed(early):
        threshold = policy.threshold(boundary)
        if threshold is not None:
            at[said.confidences[boundary] >= threshold] = boundary
    return at


def agreement(said: Choices, at: Tensor) -> float:
    """Return the share of rows whose exit, the boundary in `at`, says what the final one does."""
    dense = next(reversed(said.tokens.values()))
    return sum(float((own == dense)[at == b].sum()) for b, own in said.tokens.items()) / len(at)


def calibrate(said: Choices, weights: Weights, least: float = LEAST_AGREEMENT) -> ExitPolicy:
    """Return the policy with the least cost whose choices are, for a share `least`, the dense ones.

    Of all with one threshold, in hundredths, for one exit or two; cost is counted in weights that a
    token is multiplied with. Without a policy that saves anything, every exit is off.
    """
    *early, last = said.tokens
    off = make_exit_policy(early, [None])
    best, least_cost = off, float(weights.layer * last + weights.heads[last])
    for used in [*combinations(early, 1), *combinations(early, 2)]:
        for hundredths in range(1, 100):
            chosen = [hundredths / 100 if boundary in used else None for boundary in early]
            policy = make_exit_policy(early, chosen)
            at = exits_taken(said, policy)
            cost = weights.layer * float(at.double().mean())
            for boundary in (*used, last):
                cost += weights.heads[boundary] * float((at >= boundary).double().mean())
            if cost < least_cost and agreement(said, at) >= least:
                best, least_cost = policy, cost
    return best


@dataclass(frozen=True)
class Control:
    """Who decides tokens, after which text, at what mean depth, how often as the dense model."""

    name: str
    text: str
    mean_depth: float
    agreement: float


def controls(said: Choices, policy: ExitPolicy, text: str) -> list[Control]:
    """Return exits by confidence, the same number of exits at random rows, and each exit alone.

    Random: the mean over all ways to deal the same exits out to the rows.
    """
    at = exits_taken(said, policy)
    alone = {b: agreement(said, torch.full_like(at, b)) for b in said.tokens}
    at_random = sum(float((at == b).double().mean()) * own for b, own in alone.items())
    depth = float(at.double().mean())
    return [
        Control("exits by confidence", text, depth, agreement(said, at)),
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
    """Return the controls on each of the texts, by name, after `num_prompt` tokens.

    The last of each text is the model truncated to the depth of exits on the first text.
    """
    found: list[Control] = []
    for text, sequences in texts.items():
        said = choices(reference, sequences, num_prompt)
        found += controls(said, policy, text)
        depth = depth_of(found[0])
        shorter = truncate(model, depth)
        cut_off = ReferenceModel(shorter.config, shorter.tensors, torch.float64)
        theirs = choices(cut_off, sequences, num_prompt).tokens[depth]
        is_right = theirs == next(reversed(said.tokens.values()))
        share = float(is_right.double().mean())
        found.append(Control(f"truncated to {depth} layers", text, float(depth), share))
    return found


def depth_of(control: Control) -> int:
    """Return the number of whole layers nearest to a control's mean depth."""
    return max(1, math.floor(control.mean_depth + 0.5))
