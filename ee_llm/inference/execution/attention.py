"""Compute the attention of new rows over a paged cache of keys and values.

Legend of shapes: t rows of a pass, u those that attend, k key/value heads, r queries per key/value
head, d head dimension, c positions in the cache, B sequences, q rows of each, T positions read.
"""

from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.inference.execution.paged_attention import Kernel, PagedBatch, attend_pages

# A sequence with at least this many rows attends in a call of its own, since padding the other
# sequences to its length would cost more.
_MIN_LONG_RUN = 8


class Run(NamedTuple):
    """Consecutive rows of one sequence in a pass.

    The rows are at positions start .. stop - 1 of the sequence in `slot`; row number `first` of the
    pass is at `start`.
    """

    slot: int
    start: int
    stop: int
    first: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


def live_runs(runs: Items[Run], frozen: Collection[int]) -> list[Run] | None:
    """Return the rows whose numbers are not in `frozen`; None if no row is frozen."""
    return [run for run in _by_row(runs) if run.first not in frozen] if frozen else None


@dataclass(frozen=True)
class Group:
    """The rows of B sequences, q of each, that attend in one call.

    Attributes:
        num_sequences: B.
        rows: Numbers [B * q] of the rows among those that attend; None for all of them in order.
        reads: Positions [B * T] in the cache, or a slice of it.
        mask: Mask [B, 1, q, T] to add to the scores; None if every row sees every position.
    """

    num_sequences: int
    rows: Tensor | None
    reads: slice | Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Metadata of the rows of a pass, for the layers.

    Attributes:
        positions: Position [t] of each row in its sequence.
        writes: Positions [t] in the cache at which the layers write keys and values.
        live: Numbers [u] of the rows that attend; None for all.
        groups: Groups of rows that attend together; empty with a paged kernel.
        order: Index [u] of each attending row in the concatenated outputs of the groups; None if
            they are already in order.
        paged: Arguments of a paged kernel; None without one.
    """

    positions: Tensor
    writes: Tensor
    live: Tensor | None
    groups: tuple[Group, ...]
    order: Tensor | None
    paged: PagedBatch | None = None


class BlockTable:
    """Maps the positions of each slot's sequence to positions in the cache."""

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        kernel: Kernel | None = None,
    ) -> None:
        """Create the table.

        Args:
            num_slots: Number of slots.
            num_blocks: Greatest number of blocks of a slot.
            block_size: Positions in a block.
            device: Device of the tensors of batches.
            kernel: Paged attention kernel; None gathers keys and values instead.
        """
        self._size = block_size
        self._kernel = kernel
        self._device = device
        self._blocks = [[0] * num_blocks for _ in range(num_slots)]
        self._table = torch.zeros(num_slots, num_blocks, dtype=torch.int64, device=device)
        self._num_adjacent = [0] * num_slots  # leading blocks that are contiguous in the cache
        self._within = torch.arange(block_size, device=device)

    def set(self, slot: int, index: int, block: int) -> None:
        """Assign `block` to the slot's positions from index * block_size on."""
        blocks = self._blocks[slot]
        blocks[index] = block
        self._table[slot, index] = block
        if index == 0:
            self._num_adjacent[slot] = 1
        elif index == self._num_adjacent[slot] and block == blocks[index - 1] + 1:
            self._num_adjacent[slot] += 1

    def batch(
        self,
        ranges: Items[Run],
        live: Items[Run] | None,
        dtype: torch.dtype,
        by_row: bool = False,
    ) -> Batch:
        """Return the batch for the rows of `ranges`.

        Args:
            ranges: The rows of the pass.
            live: The rows that attend; None for all.
            dtype: Dtype of the queries.
            by_row: Give a paged kernel each row as an entry of its own.
        """
        positions = [p for run in ranges for p in range(run.start, run.stop)]
        writes = [
            self._blocks[run.slot][p // self._size] * self._size + p % self._size
            for run in ranges
            for p in range(run.start, run.stop)
        ]
        runs = list(ranges if live is None else live)
        rows = None if live is None else self._tensor([row for run in runs for row in _rows(run)])
        if self._kernel is not None:
            paged = self._paged(_by_row(runs) if by_row else runs, self._kernel)
            return Batch(self._tensor(positions), self._tensor(writes), rows, (), None, paged)
        ends = list(accumulate(run.num_rows for run in runs))
        among_live = [
            run._replace(first=end - run.num_rows) for run, end in zip(runs, ends, strict=True)
        ]
        groups, order = self._groups(among_live, dtype)
        return Batch(
            self._tensor(positions),
            self._tensor(writes),
            rows,
            tuple(groups),
            None if order is None else self._tensor(order),
        )

    def _paged(self, runs: Items[Run], kernel: Kernel) -> PagedBatch:
        def int32(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=self._device)

        return PagedBatch(
            int32(list(accumulate((run.num_rows for run in runs), initial=0))),
            int32([run.stop for run in runs]),
            self._table[[run.slot for run in runs]].int(),
            max((run.num_rows for run in runs), default=0),
            self._table.shape[1] * self._size,
            self._size,
            kernel,
        )

    def _groups(self, runs: list[Run], dtype: torch.dtype) -> tuple[list[Group], list[int] | None]:
        """Return the groups of these runs and the order of their outputs (see `Batch`)."""
        long = [[run] for run in runs if run.num_rows >= _MIN_LONG_RUN]
        short = [run for run in runs if run.num_rows < _MIN_LONG_RUN]
        all_rows = list(range(sum(run.num_rows for run in runs)))
        groups, index_of, offset = [], {}, 0
        for members in [*long, *([short] if short else [])]:
            longest = max(run.num_rows for run in members)
            rows = [run.first + min(i, run.num_rows - 1) for run in members for i in range(longest)]
            for index, row in reversed(list(enumerate(rows, start=offset))):
                index_of[row] = index
            offset += len(rows)
            reads, num_read = self._reads(members)
            groups.append(
                Group(
                    len(members),
                    None if rows == all_rows else self._tensor(rows),
                    reads,
                    self._mask(members, longest, num_read, dtype),
                )
            )
        order = [index_of[row] for row in all_rows]
        return groups, None if order == list(range(offset)) else order

    def _reads(self, runs: Items[Run]) -> tuple[slice | Tensor, int]:
        """Return the cache positions that these runs read, and their number per run."""
        # Attention multiplies masked values by 0, which keeps NaN, so a run must not read positions
        # that another sequence wrote. Past its end, a run reads its first position again.
        stop = max(run.stop for run in runs)
        num_blocks = -(-stop // self._size)
        if len(runs) == 1 and num_blocks <= self._num_adjacent[runs[0].slot]:
            first = self._blocks[runs[0].slot][0] * self._size
            return slice(first, first + stop), stop
        blocks = self._table[[run.slot for run in runs], :num_blocks]  # [B, blocks]
        reads = ((blocks * self._size)[:, :, None] + self._within).flatten(1)
        num_read = num_blocks * self._size
        if any(run.stop < num_read for run in runs):
            stops = self._tensor([run.stop for run in runs])
            is_past = torch.arange(num_read, device=self._device) >= stops[:, None]
            reads = torch.where(is_past, reads[:, :1], reads)
        return reads.flatten(), num_read

    def _mask(
        self, runs: Items[Run], longest: int, num_read: int, dtype: torch.dtype
    ) -> Tensor | None:
        if longest == 1 and all(run.stop == num_read for run in runs):
            return None
        seen = [run.start + min(i, run.num_rows - 1) for run in runs for i in range(longest)]
        unseen = torch.arange(num_read, device=self._device) > self._tensor(seen)[:, None]
        mask = torch.zeros(unseen.shape, dtype=dtype, device=self._device)
        return mask.masked_fill_(unseen, float("-inf")).view(len(runs), 1, longest, num_read)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def attend(queries: Tensor, pages: Tensor, batch: Batch) -> Tensor:
    """Return the attention output [u, k * r * d] of queries [u, k, r, d] over pages [c, 2, k, d].

    The pages must already hold the keys and values of all rows of the pass. `attend_reference` is
    the plain implementation.
    """
    if batch.paged is not None:
        return attend_pages(queries, pages, batch.paged)
    outputs = [_attend_group(queries, pages, group) for group in batch.groups]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output if batch.order is None else output[batch.order]


def _attend_group(queries: Tensor, pages: Tensor, group: Group) -> Tensor:
    queries = queries if group.rows is None else queries[group.rows]
    total, num_kv, per_kv, dim = queries.shape
    count, num_rows = group.num_sequences, total // group.num_sequences
    read = (
        pages[group.reads] if isinstance(group.reads, slice) else pages.index_select(0, group.reads)
    )
    read = read.view(count, -1, 2, num_kv, dim)
    keys, values = (read[:, :, i].transpose(1, 2) for i in (0, 1))  # [B, k, T, d]
    mask = group.mask
    if num_rows == 1:  # The r queries of a key/value head take the place of rows: [B, k, r, d].
        output = F.scaled_dot_product_attention(queries, keys, values, mask)
        return output.reshape(total, -1)
    q = queries.view(count, num_rows, num_kv, per_kv, dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(count, num_kv, per_kv * num_rows, dim)
    if mask is not None and per_kv > 1:
        mask = mask.repeat(1, 1, per_kv, 1)
    output = F.scaled_dot_product_attention(q, keys, values, mask)
    output = output.view(count, num_kv, per_kv, num_rows, dim).permute(0, 3, 1, 2, 4)
    return output.reshape(total, -1)


def attend_reference(queries: Tensor, pages: Tensor, runs: Items[Run], table: BlockTable) -> Tensor:
    """Return the result of `attend`, computed row by row from the formula; runs: the live rows."""
    outputs = []
    for run in runs:
        for row, position in zip(_rows(run), range(run.start, run.stop), strict=True):
            reads, _ = table._reads([run._replace(start=position, stop=position + 1)])
            keys, values = pages[reads][: position + 1].unbind(1)  # [T, k, d]
            scores = torch.einsum("krd,tkd->krt", queries[row], keys) / keys.shape[-1] ** 0.5
            outputs.append(torch.einsum("krt,tkd->krd", scores.softmax(-1), values).flatten())
    return torch.stack(outputs)


def _by_row(runs: Items[Run]) -> list[Run]:
    return [
        Run(run.slot, run.start + i, run.start + i + 1, run.first + i)
        for run in runs
        for i in range(run.num_rows)
    ]


def _rows(run: Run) -> range:
    return range(run.first, run.first + run.num_rows)
