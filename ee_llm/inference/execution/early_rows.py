"""Collect the newest rows of sequences at early boundaries, and compute their logits.

Legend of shapes: t rows of a pass, n tapped rows, b boundaries, h hidden, v vocabulary, p
tensor-parallel ranks.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.inference.execution.attention import Batch, Run
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.scheduling.output import Tap

MAX_LOGITS = 2**24  # early logits that are computed at once, unless one row has more


class TappedRow(NamedTuple):
    """A tap, and the number of its row in the pass."""

    tap: Tap
    row: int


MakeBatch = Callable[[Items[Run]], Batch]
"""Returns the batch of a pass of which only the given rows are live, for the block of an exit."""


def run_tapped(
    stage: ModelStage,
    index: int,
    x: Tensor,
    batch: Batch,
    tapped: Items[TappedRow],
    make_batch: MakeBatch,
    keep: Callable[[int, list[Tap], Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Return what `ModelStage.run` returns, and hand over the tapped rows at each boundary.

    Args:
        stage: The stage. It runs eagerly, since a CUDA graph would not give the rows between.
        index: Index of the layer range.
        x: Rows [t, h].
        batch: Metadata of the rows.
        tapped: The tapped rows.
        make_batch: Makes the batch for an exit with a block.
        keep: Called with a boundary, the taps at it, and either their rows [n, h] or, if their head
            is that of the exit, this rank's logits [n, v / p].
    """
    layer_range = stage.layer_ranges[index]

    def on_layer(boundary: int, rows: Tensor) -> None:
        found = [
            one for one in tapped if one.tap.head != "exits" and boundary in one.tap.boundaries
        ]
        if found:
            numbers = torch.tensor([one.row for one in found], device=rows.device)
            keep(boundary, [one.tap for one in found], rows[numbers])

    if layer_range.first == 1:
        on_layer(0, x)
    x, attended = stage.run(index, x, batch, on_layer)
    boundary = layer_range.last
    found = [one for one in tapped if one.tap.head == "exits" and boundary in one.tap.boundaries]
    if found:
        runs = [Run(tap.slot, tap.position, tap.position + 1, row) for tap, row in found]
        block_batch = make_batch(runs) if stage.has_block(index) else None
        logits = stage.logits(index, x, attended, runs, block_batch)
        keep(boundary, [one.tap for one in found], logits)
    return x, attended


def split_taps(taps: Items[Tap], num_logits: int) -> Iterator[list[int]]:
    """Yield the numbers of taps in groups of equal boundaries and heads, and of limited size.

    num_logits: number of logits of a row at one boundary.
    """
    groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for number, tap in enumerate(taps):
        groups.setdefault((tap.boundaries, tap.head), []).append(number)
    for (boundaries, _), numbers in groups.items():
        size = max(1, MAX_LOGITS // (len(boundaries) * num_logits))
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


class EarlyRows:
    """The newest row of each slot at early boundaries, kept until its final logits are there."""

    def __init__(self, stage: ModelStage, num_slots: int) -> None:
        self._stage = stage
        self._num_slots = num_slots
        self._hidden: dict[int, Tensor] = {}  # {boundary: [slots, h]}
        self._logits: dict[int, Tensor] = {}  # {boundary: [slots, v / p]} of exits' own heads

    def keep(self, boundary: int, taps: list[Tap], rows: Tensor) -> None:
        """Store rows [n, h], or logits [n, v / p] if the head is that of the exit."""
        kept = self._logits if taps[0].head == "exits" else self._hidden
        if boundary not in kept:
            kept[boundary] = rows.new_zeros(self._num_slots, rows.shape[1])
        kept[boundary][self._slots(taps)] = rows

    def logits(self, taps: list[Tap]) -> Tensor:
        """Return this rank's early logits [n * b, v / p] of taps with equal boundaries and head."""
        slots, boundaries, head = self._slots(taps), taps[0].boundaries, taps[0].head
        kept = self._logits if head == "exits" else self._hidden
        rows = torch.stack([kept[boundary][slots] for boundary in boundaries], dim=1).flatten(0, 1)
        return rows if head == "exits" else self._stage.early_logits(rows, head == "final")

    def pack(self, taps: Items[Tap], last: int) -> tuple[Tensor, Tensor]:
        """Return the rows and logits of taps at boundaries up to `last`, for the next stage.

        Returns:
            Rows [.., h] and logits [.., v / p], by boundary and then in the order of the taps.
        """
        hidden = [torch.empty(0, self._stage.hidden_size)]
        logits = [torch.empty(0, self._stage.num_logits)]
        for boundary, found in _by_boundary(taps, last):
            is_own = found[0].head == "exits"
            kept = (self._logits if is_own else self._hidden)[boundary]
            (logits if is_own else hidden).append(kept[self._slots(found)])
        dtype, device = self._stage.dtype, self._stage.device
        return (
            torch.cat([part.to(device, dtype) for part in hidden]),
            torch.cat([part.to(device, dtype) for part in logits]),
        )

    def unpack(self, taps: Items[Tap], last: int, hidden: Tensor, logits: Tensor) -> None:
        """Store what `pack` returned on the previous stage, which ends with layer `last`."""
        for boundary, found in _by_boundary(taps, last):
            is_own = found[0].head == "exits"
            rows = (logits if is_own else hidden)[: len(found)]
            self.keep(boundary, found, rows)
            if is_own:
                logits = logits[len(found) :]
            else:
                hidden = hidden[len(found) :]

    def _slots(self, taps: list[Tap]) -> Tensor:
        return torch.tensor([tap.slot for tap in taps], device=self._stage.device)


def _by_boundary(taps: Items[Tap], last: int) -> Iterator[tuple[int, list[Tap]]]:
    """Yield boundaries up to `last`, each with its taps, those with the exit's head apart."""
    for boundary in sorted({at for tap in taps for at in tap.boundaries if at <= last}):
        for is_own in (False, True):
            found = [
                tap
                for tap in taps
                if boundary in tap.boundaries and (tap.head == "exits") == is_own
            ]
            if found:
                yield boundary, found
