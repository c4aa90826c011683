"""Collect the newest rows of sequences at early boundaries, and compute their logits.

Legend of shapes: t rows of a pass, n queried rows, b boundaries, h hidden, v vocabulary, p
tensor-parallel ranks.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.inference.execution.attention import Batch, Run
from ee_llm.inference.execution.head import HiddenRows
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.scheduling.output import EarlyQuery

MAX_LOGITS = 2**24  # early logits that are computed at once, unless one row has more


class QueriedRow(NamedTuple):
    """A query for early logits, and the number of its row in the pass."""

    query: EarlyQuery
    row: int


MakeBatch = Callable[[Items[Run]], Batch]
"""Returns the batch of a pass of which only the given rows are live, for the block of an exit."""


def run_with_early(
    stage: ModelStage,
    index: int,
    x: Tensor,
    batch: Batch,
    queried: Items[QueriedRow],
    make_batch: MakeBatch,
    keep: Callable[[int, list[EarlyQuery], Tensor], None],
) -> HiddenRows:
    """Return what `ModelStage.run` returns, and hand over the queried rows at each boundary.

    Args:
        stage: The stage. It runs eagerly, since a CUDA graph would not give the rows between.
        index: Index of the layer range.
        x: Rows [t, h].
        batch: Metadata of the rows.
        queried: The queried rows.
        make_batch: Makes the batch for an exit with a block.
        keep: Called with a boundary, the queries at it, and either their rows [n, h] or, if their
            head is that of the exit, this rank's logits [n, v / p].
    """
    layer_range = stage.layer_ranges[index]

    def on_layer(boundary: int, rows: Tensor) -> None:
        here = [q for q in queried if q.query.head != "exits" and boundary in q.query.boundaries]
        if here:
            numbers = torch.tensor([q.row for q in here], device=rows.device)
            keep(boundary, [q.query for q in here], rows[numbers])

    if layer_range.first == 1:
        on_layer(0, x)
    hidden = stage.run(index, x, batch, on_layer)
    boundary = layer_range.last
    here = [q for q in queried if q.query.head == "exits" and boundary in q.query.boundaries]
    if here:
        runs = [Run(query.slot, query.position, query.position + 1, row) for query, row in here]
        block_batch = make_batch(runs) if stage.has_block(index) else None
        logits = stage.logits(index, hidden, runs, block_batch)
        keep(boundary, [q.query for q in here], logits)
    return hidden


def split_queries(queries: Items[EarlyQuery], num_logits: int) -> Iterator[list[int]]:
    """Yield the numbers of queries in groups of equal boundaries and heads, and of limited size.

    num_logits: number of logits of a row at one boundary.
    """
    groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault((query.boundaries, query.head), []).append(number)
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

    def keep(self, boundary: int, queries: list[EarlyQuery], rows: Tensor) -> None:
        """Store rows [n, h], or logits [n, v / p] if the head is that of the exit."""
        kept = self._logits if queries[0].head == "exits" else self._hidden
        if boundary not in kept:
            kept[boundary] = rows.new_zeros(self._num_slots, rows.shape[1])
        kept[boundary][self._slots(queries)] = rows

    def logits(self, queries: list[EarlyQuery]) -> Tensor:
        """Return this rank's early logits [n * b, v / p]; the queries have one head."""
        slots, boundaries, head = self._slots(queries), queries[0].boundaries, queries[0].head
        kept = self._logits if head == "exits" else self._hidden
        rows = torch.stack([kept[boundary][slots] for boundary in boundaries], dim=1).flatten(0, 1)
        return rows if head == "exits" else self._stage.early_logits(rows, head == "final")

    def pack(self, queries: Items[EarlyQuery], last: int) -> tuple[Tensor, Tensor]:
        """Return the rows and logits of queries at boundaries up to `last`, for the next stage.

        Returns:
            Rows [.., h] and logits [.., v / p], by boundary and then in the order of the queries.
        """
        hidden = [torch.empty(0, self._stage.hidden_size)]
        logits = [torch.empty(0, self._stage.num_logits)]
        for boundary, here in _by_boundary(queries, last):
            is_own = here[0].head == "exits"
            kept = (self._logits if is_own else self._hidden)[boundary]
            (logits if is_own else hidden).append(kept[self._slots(here)])
        dtype, device = self._stage.dtype, self._stage.device
        return (
            torch.cat([part.to(device, dtype) for part in hidden]),
            torch.cat([part.to(device, dtype) for part in logits]),
        )

    def unpack(self, queries: Items[EarlyQuery], last: int, hidden: Tensor, logits: Tensor) -> None:
        """Store what `pack` returned on the previous stage, which ends with layer `last`."""
        for boundary, here in _by_boundary(queries, last):
            is_own = here[0].head == "exits"
            rows = (logits if is_own else hidden)[: len(here)]
            self.keep(boundary, here, rows)
            if is_own:
                logits = logits[len(here) :]
            else:
                hidden = hidden[len(here) :]

    def _slots(self, queries: list[EarlyQuery]) -> Tensor:
        return torch.tensor([query.slot for query in queries], device=self._stage.device)


def _by_boundary(queries: Items[EarlyQuery], last: int) -> Iterator[tuple[int, list[EarlyQuery]]]:
    """Yield boundaries up to `last`, each with its queries, those with the exit's head apart."""
    for boundary in sorted({at for query in queries for at in query.boundaries if at <= last}):
        for is_own in (False, True):
            here = [
                query
                for query in queries
                if boundary in query.boundaries and (query.head == "exits") == is_own
            ]
            if here:
                yield boundary, here
