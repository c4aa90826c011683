"""A pass as data: which rows run through which segments."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ee_llm.inference.choices import HIDDEN_MEASURES, Measure

if TYPE_CHECKING:
    from ee_llm.inference.decoding.settings import Contrast, EarlyHead


@dataclass(frozen=True)
class TokenRange:
    """The rows at positions start .. stop-1 of the sequence in `slot`."""

    slot: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SegmentStep:
    """The rows of a pass in one segment. frozen: numbers of the rows that keep their state."""

    segment: int
    ranges: tuple[TokenRange, ...]
    frozen: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Number of rows that run through the segment."""
        return sum(map(len, self.ranges))


@dataclass(frozen=True)
class EarlyQuery:
    """A row whose logits are contrasted with early ones, at these boundaries (see `Contrast`)."""

    slot: int
    position: int
    boundaries: tuple[int, ...]
    head: "EarlyHead"


def make_early_query(contrast: "Contrast", slot: int, position: int) -> EarlyQuery:
    """Return the early query that a row with these settings needs."""
    assert isinstance(contrast.layers, tuple), "the engine checks that boundaries are resolved"
    assert contrast.head is not None, "the engine checks that the head is resolved"
    return EarlyQuery(slot, position, contrast.layers, contrast.head)


@dataclass(frozen=True)
class HiddenQuery:
    """A row whose confidence at an exit is known before the exit's output projection.

    Attributes:
        row: Number of the row among those that the exit decides about.
        measure: Measure of confidence.
        threshold: Least confidence that exits.
        predicted: Tokens of the shortlist, for the measure "shortlist".
    """

    row: int
    measure: Measure
    threshold: float
    predicted: tuple[int, ...] = ()


def is_hidden(measure: Measure, predicted: tuple[int, ...]) -> bool:
    """Return whether an exit measures confidence before its output projection.

    predicted: what a shallower exit predicted for the row.
    """
    return measure in HIDDEN_MEASURES or (measure == "shortlist" and bool(predicted))


@dataclass(frozen=True)
class SchedulerOutput:
    """One pass.

    Attributes:
        steps: Consecutive segments and their rows.
        tokens: Token ids of the rows that enter segment 0.
        logit_rows: Rows that the exit at the end of the last step decides about.
        new_blocks: Newly taken blocks as (slot, index within the sequence, block).
        zeroed: Blocks to zero before the pass.
        early_queries: Rows of the pass that need early logits.
        hidden_queries: Those of `logit_rows` that need logits only if they are confident.
    """

    steps: tuple[SegmentStep, ...]
    tokens: tuple[int, ...]
    logit_rows: tuple[TokenRange, ...]
    new_blocks: tuple[tuple[int, int, int], ...]
    zeroed: tuple[int, ...] = ()
    early_queries: tuple[EarlyQuery, ...] = ()
    hidden_queries: tuple[HiddenQuery, ...] = ()

    @property
    def last_segment(self) -> int:
        """Segment at whose end the pass stops."""
        return self.steps[-1].segment
