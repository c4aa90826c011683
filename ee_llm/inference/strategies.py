"""Decoding strategies: what happens once an exit is confident."""

from dataclasses import dataclass
from typing import Literal, get_args

from ee_llm.errors import RequestError

Strategy = Literal["exact", "full", "self-speculative", "propagate", "sled", "dola"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
# Every token of these strategies is decided at the final exit.
FULL_DEPTH: tuple[Strategy, ...] = ("full", "self-speculative", "sled", "dola")


@dataclass(frozen=True)
class SelfSpeculation:
    """Settings of the strategy `self-speculative` (LayerSkip, arXiv 2404.16710).

    Attributes:
        draft_exit: Boundary of the exit that drafts tokens; None for the model's first exit.
        draft_length: Maximum number of tokens drafted between two passes through all layers.
        draft_threshold: Drafting stops when the exit's confidence is below this; None never stops
            it early.

    Raises:
        RequestError: A field is not valid.
    """

    draft_exit: int | None = None
    draft_length: int = 4
    draft_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.draft_exit is not None and type(self.draft_exit) is not int:
            raise RequestError(f"draft_exit = {self.draft_exit!r} must be an integer, or None")
        if type(self.draft_length) is not int or self.draft_length < 1:
            raise RequestError(
                f"draft_length = {self.draft_length!r} must be an integer of at least 1"
            )
        threshold = self.draft_threshold
        if threshold is None:
            return
        if not isinstance(threshold, int | float) or not 0.0 < threshold <= 1.0:  # NaN fails too
            raise RequestError(f"draft_threshold = {threshold!r} is not in (0, 1]")
