"""Decoding strategies: what happens once an exit is confident."""

from dataclasses import dataclass
from typing import Literal, get_args

from ee_llm.errors import RequestError

Strategy = Literal["exact", "full", "self-speculative", "propagate"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class SelfSpeculation:
    """How the strategy `self-speculative` drafts tokens (LayerSkip, arXiv 2404.16710).

    boundary: of the exit that drafts. length: at most so many tokens between two deep passes.
    threshold: drafting goes on while the exit's confidence reaches it; None: always.
    """

    boundary: int
    length: int = 4
    threshold: float | None = None

    def __post_init__(self) -> None:
        if type(self.length) is not int or self.length < 1:
            raise RequestError(f"draft length {self.length!r} must be a whole number of at least 1")
        if self.threshold is not None and not 0.0 < self.threshold <= 1.0:  # NaN fails too
            raise RequestError(f"draft threshold {self.threshold} is not in (0, 1]")
