"""Attention over the paged cache: every code path against the formula and `attend_reference`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from ee_llm.inference.execution.attention import Batch, BlockTable, Run, attend, attend_reference

SIZE, DIM, NUM_BLOCKS, NUM_SLOTS = 4, 8, 24, 5
HEADS = [(1, 1), (2, 2), (1, 4), (3, 1)]  # key/value heads, queries of each


@dataclass(frozen=True)
class Rows:
    """Rows start .. stop-1 of a sequence whose positions lie in `blocks`."""

    start: int
    stop: int
    blocks: tuple[int, ...]


class Cache:
    """Random keys and values at the positions of some sequences, and large junk elsewhere."""

    def __init__(
        self, rows: Sequence[Rows], num_kv: int = 2, per_kv: int = 2, dtype=torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.rows, self.dtype = rows, dtype
        self.table = BlockTable(NUM_SLOTS, 8, SIZE, torch.device("cpu"))
        self.pages = 50.0 * normal(NUM_BLOCKS * SIZE, 2, num_kv, DIM)
        self.states = [normal(one.stop, 2, num_kv, DIM) for one in rows]  # of each sequence
        ends = list(accumulate(one.stop - one.start for one in rows))
        self.queries = normal(ends[-1], num_kv, per_kv, DIM)
        self.runs = []
        for slot, (one, end, state) in enumerate(zip(rows, ends, self.states, strict=True)):
            for index, block in enumerate(one.blocks):
                self.table.set(slot, index, block)
            for position in range(one.start):
                at = one.blocks[position // SIZE] * SIZE + position % SIZE
                self.pages[at] = state[position]
            self.runs.append(Run(slot, one.start, one.stop, end - (one.stop - one.start)))

    def batch(self, live: list[Run] | None = None) -> Batch:
        """Return the batch, after writing the new rows at its `writes`."""
        batch = self.table.batch(self.runs, live, self.dtype)
        new = [state[one.start :] for one, state in zip(self.rows, self.states, strict=True)]
        self.pages.index_copy_(0, batch.writes, torch.cat(new))
        return batch

    def expected(self, runs: Sequence[Run]) -> Tensor:
        """Return softmax(q k / sqrt(d)) v of the rows, from each sequence's own states."""
        mixed = []
        for run in runs:
            for index in range(run.num_rows):
                keys, values = self.states[run.slot][: run.start + index + 1].double().unbind(1)
                heads = []
                for group, queries in enumerate(self.queries[run.first + index].double()):
                    for query in queries:
                        weights = (keys[:, group] @ query / DIM**0.5).softmax(dim=0)
                        heads.append(weights @ values[:, group])
                mixed.append(torch.cat(heads))
        return torch.stack(mixed).to(self.dtype)

    def check(self, live: list[Run] | None = None) -> Batch:
        batch = self.batch(live)
        runs = self.runs if live is None else live
        queries = self.queries if live is None else self.queries[batch.live]
        numbers = accumulate((run.num_rows for run in runs), initial=0)
        among_live = [run._replace(first=n) for run, n in zip(runs, numbers, strict=False)]
        found = attend(queries, self.pages, batch)
        tolerance = 1e-12 if self.dtype == torch.float64 else 1e-5
        expected = self.expected(runs)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        plain = attend_reference(queries, self.pages, among_live, self.table)
        torch.testing.assert_close(plain, expected, rtol=0, atol=tolerance)
        return batch


@dataclass(frozen=True)
class Path:
    """Rows, and how they must be read: groups as (sequences, is a view, is masked, is padded)."""

    name: str
    rows: tuple[Rows, ...]
    groups: tuple[tuple[int, bool, bool, bool], ...]
    is_reordered: bool = False


PATHS = [
    Path("one row, a view", (Rows(6, 7, (3, 4)),), ((1, True, False, False),)),
    Path("the first row", (Rows(0, 1, (3,)),), ((1, True, False, False),)),
    Path("one row, scattered", (Rows(6, 7, (5, 2)),), ((1, False, True, False),)),
    Path("one row at a block's end", (Rows(7, 8, (5, 2)),), ((1, False, False, False),)),
    Path("a view of adjacent blocks", (Rows(7, 8, (2, 3, 9)),), ((1, True, False, False),)),
    Path("only some blocks adjacent", (Rows(10, 11, (2, 3, 9)),), ((1, False, True, False),)),
    Path(
        "rows of one length, unmasked",
        (Rows(7, 8, (5, 6)), Rows(7, 8, (9, 2))),
        ((2, False, False, False),),
    ),
    Path(
        "rows of all lengths",
        (Rows(0, 1, (5,)), Rows(18, 19, (9, 2, 11, 3, 4)), Rows(4, 5, (6, 7))),
        ((3, False, True, False),),
    ),
    Path(
        "short runs of one length",
        (Rows(2, 5, (5, 8)), Rows(9, 12, (3, 4, 11))),
        ((2, False, True, False),),
    ),
    Path(
        "short runs, padded",
        (Rows(2, 5, (5, 8)), Rows(0, 7, (3, 4)), Rows(6, 7, (11, 1))),
        ((3, False, True, True),),
        is_reordered=True,
    ),
    Path("one short run, a view", (Rows(3, 6, (7, 8)),), ((1, True, True, False),)),
    Path("a long run, a view", (Rows(3, 14, (4, 5, 6, 7)),), ((1, True, True, False),)),
    Path("a whole prompt, scattered", (Rows(0, 12, (7, 2, 5)),), ((1, False, True, False),)),
    Path(
        "long and short runs",
        (
            Rows(5, 6, (1, 2)),
            Rows(0, 9, (3, 4, 5)),
            Rows(1, 4, (6,)),
            Rows(4, 12, (7, 9, 8)),
            Rows(0, 1, (10,)),
        ),
        ((1, True, True, True), (1, False, True, True), (3, False, True, True)),
        is_reordered=True,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("num_kv", "per_kv"), HEADS)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_each_path_gives_the_result_of_the_formula(
    path: Path, num_kv: int, per_kv: int, dtype: torch.dtype
) -> None:
    batch = Cache(path.rows, num_kv, per_kv, dtype).check()
    kinds = [
        (
            group.num_sequences,
            isinstance(group.reads, slice),
            group.mask is not None,
            group.rows is not None,
        )
        for group in batch.groups
    ]
    assert kinds == list(path.groups), "the test expects another path"
    assert (batch.order is not None) == path.is_reordered
    assert batch.live is None


def test_positions_are_counted_from_the_sequence_start() -> None:
    cache = Cache([Rows(5, 7, (5, 2)), Rows(0, 1, (8,))])
    batch = cache.batch()
    assert batch.positions.tolist() == [5, 6, 0]
    assert batch.writes.tolist() == [2 * SIZE + 1, 2 * SIZE + 2, 8 * SIZE]


@pytest.mark.parametrize(("num_kv", "per_kv"), HEADS)
def test_frozen_rows_are_written_and_read_but_do_not_attend(num_kv: int, per_kv: int) -> None:
    rows = [Rows(2, 13, (5, 8, 9, 10)), Rows(3, 5, (1, 2)), Rows(0, 2, (4,))]
    cache = Cache(rows, num_kv, per_kv)
    live = [Run(0, 4, 5, 2), Run(0, 7, 10, 5), Run(1, 3, 5, 11)]
    batch = cache.check(live)
    assert batch.live is not None
    assert batch.live.tolist() == [2, 5, 6, 7, 11, 12]
    assert len(batch.writes) == 15


def test_only_a_long_run_may_be_live() -> None:
    cache = Cache([Rows(0, 2, (4,)), Rows(1, 13, (5, 6, 7, 8))])
    assert len(cache.check([Run(1, 2, 12, 3)]).groups) == 1


def test_there_may_be_no_live_row() -> None:
    cache = Cache([Rows(0, 2, (4,))])
    batch = cache.batch(live=[])
    assert (batch.groups, len(batch.writes)) == ((), 2)
    assert batch.live is not None
    assert batch.live.tolist() == []


def test_a_slot_drops_the_blocks_of_its_previous_sequence() -> None:
    """Adjacent blocks become scattered ones, and the reverse."""
    for before, after in (((3, 4, 5), (6, 2, 3)), ((6, 2, 3), (3, 4, 5)), ((3, 4, 5), (7,))):
        cache = Cache([Rows(4 * len(after) - 2, 4 * len(after) - 1, after)])
        for blocks in (before, after):
            for index, block in enumerate(blocks):
                cache.table.set(0, index, block)
        cache.check()


@pytest.mark.parametrize("seed", range(40))
def test_any_rows_in_any_blocks(seed: int) -> None:
    rng = random.Random(seed)
    free = list(range(1, NUM_BLOCKS))
    if rng.random() < 0.7:
        rng.shuffle(free)
    rows = []
    for _ in range(rng.randint(1, NUM_SLOTS)):
        stop = rng.randint(1, 16)
        start = rng.choice([stop - 1, rng.randrange(stop), max(0, stop - 3)])
        rows.append(Rows(start, stop, tuple(free.pop(0) for _ in range(-(-stop // SIZE)))))
    cache = Cache(rows, *rng.choice(HEADS))
    cache.check()
    live = [
        Run(run.slot, run.start + index, run.start + index + 1, run.first + index)
        for run in cache.runs
        for index in range(run.num_rows)
        if rng.random() < 0.6
    ]
    if live:
        cache.check(live)
