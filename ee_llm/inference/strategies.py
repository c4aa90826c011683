"""Decoding strategies: what happens once an exit is confident."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from ee_llm.errors import RequestError
from ee_llm.inference.decoding.settings import CONTRASTS, Contrast, resolve_contrast, strategy_of
from ee_llm.inference.sampling.plain_numbers import plain_float, plain_int

if TYPE_CHECKING:
    from ee_llm.config import Config

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
        exit, length = plain_int(self.draft_exit), plain_int(self.draft_length)
        if self.draft_exit is not None and exit is None:
            raise RequestError(f"draft_exit = {self.draft_exit!r} must be an integer, or None")
        if length is None or length < 1:
            raise RequestError(
                f"draft_length = {self.draft_length!r} must be an integer of at least 1"
            )
        threshold = plain_float(self.draft_threshold)
        if self.draft_threshold is not None and (
            threshold is None or not 0.0 < threshold <= 1.0  # NaN fails too
        ):
            raise RequestError(f"draft_threshold = {self.draft_threshold!r} is not in (0, 1]")
        object.__setattr__(self, "draft_exit", exit)
        object.__setattr__(self, "draft_length", length)
        object.__setattr__(self, "draft_threshold", threshold)


def resolve_strategy(
    strategy: Strategy | SelfSpeculation | Contrast, config: "Config"
) -> tuple[Strategy, SelfSpeculation | None, Contrast | None]:
    """Return the name of a strategy, and its settings for a model.

    Raises RequestError if the settings do not fit the model.
    """
    if isinstance(strategy, SelfSpeculation) or strategy == "self-speculative":
        given = strategy if isinstance(strategy, SelfSpeculation) else SelfSpeculation()
        return "self-speculative", _resolve_speculation(given, config), None
    if isinstance(strategy, Contrast):
        contrast = resolve_contrast(strategy, config)
        return strategy_of(contrast), None, contrast
    if isinstance(strategy, str) and strategy in CONTRASTS:
        return strategy, None, resolve_contrast(CONTRASTS[strategy](), config)
    return strategy, None, None


def _resolve_speculation(given: SelfSpeculation, config: "Config") -> SelfSpeculation:
    boundaries = config.exits.boundaries
    if not boundaries:
        raise RequestError(
            "strategy = 'self-speculative' drafts at an exit, but the model has none. Add exits"
            " with 'ee-llm checkpoint add-exits', then tune them with 'ee-llm tune'."
        )
    return given if given.draft_exit is not None else replace(given, draft_exit=boundaries[0])
