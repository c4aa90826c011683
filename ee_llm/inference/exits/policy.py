"""When a token leaves at an exit: measures of confidence and the policy that thresholds them."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ee_llm.errors import RequestError
from ee_llm.inference.strategies import Strategy

Measure = Literal["max_probability", "entropy", "margin"]


def max_probability(logits: Tensor) -> Tensor:
    """Return the probability [...] of the most probable token (CALM, arXiv 2207.07061)."""
    return _log_probabilities(logits).amax(dim=-1).exp()


def entropy(logits: Tensor) -> Tensor:
    """Return 1 - H(p) / log v [...]: 1 for a certain distribution, 0 for the uniform one."""
    information = torch.special.entr(_log_probabilities(logits).exp()).sum(dim=-1)
    return (1.0 - information / math.log(logits.shape[-1])).clamp(0.0, 1.0)


def margin(logits: Tensor) -> Tensor:
    """Return the most probable token's probability less the second's [...] (CALM)."""
    best = _log_probabilities(logits).topk(2, dim=-1).values.exp()
    return best[..., 0] - best[..., 1]


MEASURES: dict[Measure, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "entropy": entropy,
    "margin": margin,
}


@dataclass(frozen=True)
class ExitPolicy:
    """Which exits a token may leave at, and how confident it must be there.

    boundaries: the model's exits without the final one, increasing.
    thresholds: one per boundary, in (0, 1], or None: this exit is off.
    measure: what confidence is, of the exit's own distribution before any sampling setting.
    """

    boundaries: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    measure: Measure = "max_probability"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise RequestError(
                f"measure {self.measure!r} is unknown; choose of {', '.join(MEASURES)}"
            )
        if len(self.thresholds) != len(self.boundaries):
            raise RequestError(
                f"thresholds: {len(self.thresholds)} given for {len(self.boundaries)} exits at"
                f" boundaries {list(self.boundaries)}; give one per exit, or a single one for all"
            )
        for threshold in self.thresholds:
            if threshold is not None and not 0.0 < threshold <= 1.0:  # NaN fails the test too
                raise RequestError(
                    f"thresholds: {threshold} is not in (0, 1]; 1 means 'only if certain', and an"
                    " exit that shall never be taken is 'off'"
                )

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits that name this policy: equal policies have equal digests."""
        rows = [
            [boundary, None if threshold is None else float(threshold).hex()]
            for boundary, threshold in zip(self.boundaries, self.thresholds, strict=True)
        ]
        text = json.dumps([self.measure, rows], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def threshold(self, boundary: int) -> float | None:
        """Return the threshold of the exit at `boundary`, None if it is off or no such exit."""
        return dict(zip(self.boundaries, self.thresholds, strict=True)).get(boundary)

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the confidence [...] in [0, 1] of logits [..., v], in float32 (float64 if so)."""
        return MEASURES[self.measure](logits)

    def leaves(self, boundary: int, confidence: float) -> bool:
        """Return whether a token of this confidence leaves at the (not final) exit `boundary`."""
        threshold = self.threshold(boundary)
        return threshold is not None and confidence >= threshold

    def without_exits(self) -> "ExitPolicy":
        """Return the policy of the `full` strategy: the same measure, every exit off."""
        return ExitPolicy(self.boundaries, (None,) * len(self.boundaries), self.measure)

    def under(self, strategy: Strategy) -> "ExitPolicy":
        """Return the policy in force under a strategy: full and self-speculative turn exits off."""
        return self.without_exits() if strategy in ("full", "self-speculative") else self

    def check_fits(self, boundaries: Sequence[int]) -> None:
        """Raise RequestError unless the policy is for a model with early exits at `boundaries`."""
        if self.boundaries != tuple(boundaries):
            raise RequestError(
                f"the policy is for exits at boundaries {list(self.boundaries)}, but the model has"
                f" {list(boundaries)}"
            )


def make_exit_policy(
    boundaries: Sequence[int],
    thresholds: Sequence[float | None],
    measure: Measure = "max_probability",
) -> ExitPolicy:
    """Return the policy for exits at `boundaries`; a single threshold stands for all of them.

    Raises RequestError for a threshold outside (0, 1], a wrong number of them, an unknown measure.
    """
    if len(thresholds) == 1:
        thresholds = tuple(thresholds) * len(boundaries) or _no_exits(thresholds[0])
    return ExitPolicy(tuple(boundaries), tuple(thresholds), measure)


def _no_exits(threshold: float | None) -> tuple[float | None, ...]:
    """Return no threshold for a model without exits, after the check that one is well formed."""
    ExitPolicy((0,), (threshold,))
    return ()


def _log_probabilities(logits: Tensor) -> Tensor:
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.log_softmax(dim=-1, dtype=precise)
