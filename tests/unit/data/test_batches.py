"""Microbatches: the samples of a step depend on the consumed samples, not on the layout."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ee_llm.data
from ee_llm.data.batches import BatchShape, EvaluationBatches, Microbatch, TrainingBatches
from ee_llm.data.dataset import Blend, RowOptions, open_blend
from tests.unit.data.conftest import WriteData

# Tokens never repeat, so that the first token identifies a row.
SEQ_LENGTH = 5

with_data = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def blend(write_data: WriteData) -> Blend:
    prefixes = [
        write_data("a", [list(range(1, 102))]),
        write_data("b", [list(range(1001, 1048))]),
    ]
    options = RowOptions(
        eos_token_id=0, vocab_size=2_000, mask_after_eos=True, reset_positions=True
    )
    return open_blend(
        prefixes, "train", seq_length=SEQ_LENGTH, options=options, seed=3, weights=(0.6, 0.4),
        fractions=(1, 0, 0),
    )  # fmt: skip


def rows(step: list[Microbatch]) -> list[tuple]:
    return [
        tuple(map(tuple, (tensor[r].tolist() for tensor in microbatch)))
        for microbatch in step
        for r in range(len(microbatch.tokens))
    ]


layouts = st.tuples(st.integers(1, 3), st.integers(1, 3))  # data-parallel size, microbatch size


def shapes(num_rows: int, data_size: int, micro_batch_size: int) -> list[BatchShape]:
    return [BatchShape(micro_batch_size, num_rows, rank, data_size) for rank in range(data_size)]


@with_data
@given(first=layouts, second=layouts, factor=st.integers(1, 3), consumed=st.integers(0, 500))
def test_samples_do_not_depend_on_the_layout(
    blend: Blend, first: tuple, second: tuple, factor: int, consumed: int
):
    num_rows = int(np.lcm(np.prod(first), np.prod(second))) * factor
    sample_counts = []
    for data_size, micro_batch_size in (first, second):
        ranks = [
            TrainingBatches(blend, shape, consumed)
            for shape in shapes(num_rows, data_size, micro_batch_size)
        ]
        steps = [[row for rank in ranks for row in rows(next(rank))] for _ in range(3)]
        assert all(len(step) == num_rows for step in steps)
        sample_counts.append([Counter(step) for step in steps])
    assert sample_counts[0] == sample_counts[1]


@with_data
@given(
    done=st.integers(0, 6),
    before=layouts,
    after=layouts,
    factor=st.integers(1, 2),
)
def test_resume_is_exact(blend: Blend, done: int, before: tuple, after: tuple, factor: int):
    """A run that stops after any step and resumes on any layout continues with the same steps."""
    num_rows = int(np.lcm(np.prod(before), np.prod(after))) * factor
    uninterrupted = TrainingBatches(blend, BatchShape(num_rows, num_rows))
    expected = [Counter(rows(next(uninterrupted))) for _ in range(done + 2)]
    (data_size, micro_batch_size) = before
    stopped = TrainingBatches(blend, shapes(num_rows, data_size, micro_batch_size)[0])
    for _ in range(done):
        next(stopped)
    (data_size, micro_batch_size) = after
    resumed = [
        TrainingBatches(blend, shape, stopped.consumed_samples)
        for shape in shapes(num_rows, data_size, micro_batch_size)
    ]
    for step in range(done, done + 2):
        assert Counter(row for rank in resumed for row in rows(next(rank))) == expected[step]


def test_resume_on_the_same_layout_is_identical(blend: Blend):
    shape = BatchShape(2, 8, data_rank=1, data_size=2)
    uninterrupted = TrainingBatches(blend, shape)
    steps = [next(uninterrupted) for _ in range(4)]
    resumed = TrainingBatches(blend, shape)
    resumed.consumed_samples = 16
    for expected, actual in zip(steps[2:], [next(resumed), next(resumed)], strict=True):
        for a, b in zip(expected, actual, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert resumed.consumed_samples == uninterrupted.consumed_samples == 32


def test_ranks_have_disjoint_samples(blend: Blend):
    shape = BatchShape(1, 6, data_rank=0, data_size=3)
    places = [
        place
        for rank in range(3)
        for offsets in BatchShape(1, 6, rank, 3).offsets()
        for place in offsets
    ]
    assert sorted(places) == list(range(6))
    assert shape.num_microbatches == len(shape.offsets()) == 2


def test_microbatch(blend: Blend):
    batches = TrainingBatches(blend, BatchShape(3, 6))
    assert iter(batches) is batches
    step = next(batches)
    assert [tuple(tensor.shape) for tensor in step[0]] == [(3, SEQ_LENGTH)] * 4
    assert [tensor.dtype for tensor in step[0]] == [
        torch.int64, torch.int64, torch.float32, torch.int64
    ]  # fmt: skip
    assert all(tensor.is_contiguous() for microbatch in step for tensor in microbatch)
    step += next(batches)  # The rows of the second step follow those of the first.
    expected = [blend.row(blend.locate(i)) for i in range(12)]
    for i, row in enumerate(expected):
        for tensor, array in zip(step[i // 3], row, strict=True):
            assert np.array_equal(tensor[i % 3].numpy(), array)


def test_error_consumes_no_samples(write_data: WriteData):
    prefix = write_data("bad", [[1, 500, 2]])
    options = RowOptions(eos_token_id=0, vocab_size=100)
    bad = open_blend([prefix], "train", seq_length=2, options=options, seed=0, fractions=(1, 0, 0))
    batches = TrainingBatches(bad, BatchShape(1, 1))
    with pytest.raises(ValueError, match=r"bad\.bin: token id 500"):
        next(batches)
    assert batches.consumed_samples == 0


@with_data
@given(layout=layouts, factor=st.integers(1, 4), num_steps=st.integers(1, 40))
def test_evaluation_samples_are_fixed(blend: Blend, layout: tuple, factor: int, num_steps: int):
    """On any layout, each iteration has the same steps, with each sample of a small set once."""
    data_size, micro_batch_size = layout
    num_rows = data_size * micro_batch_size * factor
    ranks = [
        EvaluationBatches(blend, shape, num_steps)
        for shape in shapes(num_rows, data_size, micro_batch_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    steps = [
        Counter(row for step in steps for row in rows(step)) for steps in zip(*ranks, strict=True)
    ]
    assert len(steps) == len(ranks[0]) <= num_steps
    again = [
        Counter(row for step in steps for row in rows(step)) for steps in zip(*ranks, strict=True)
    ]
    assert again == steps
    all_rows = sum(steps, Counter())
    padding = {row: n for row, n in all_rows.items() if not any(row[2])}
    valid = Counter({row: n for row, n in all_rows.items() if any(row[2])})
    wanted = min(num_steps * num_rows, len(blend))
    assert valid == Counter(tuple(map(tuple, (a.tolist() for a in blend.row(location))))
                            for location in blend.distinct_samples(wanted))  # fmt: skip
    assert set(valid.values()) == {1}
    assert sum(padding.values()) == len(steps) * num_rows - wanted
    assert all(any(any(row[2]) for row in step) for step in steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 10, 0, 2), r"global_batch_size = 10 is not a multiple of .*= 2 x 2\. .* is 12"),
        ((0, 10), r"training\.micro_batch_size = 0.*: both must be at least 1"),
        ((1, 0), r"training\.global_batch_size = 0: both must be at least 1"),
        ((1, 2, 2, 2), r"data-parallel rank 2 is outside 0\.\.1"),
    ],
)
def test_invalid_shapes(arguments: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        BatchShape(*arguments)


def test_invalid_numbers(blend: Blend):
    with pytest.raises(ValueError, match="consumed_samples = -1"):
        TrainingBatches(blend, BatchShape(1, 1), -1)
    with pytest.raises(ValueError, match=r"training\.eval_steps = 0"):
        EvaluationBatches(blend, BatchShape(1, 1), 0)


def test_package_exports_microbatch():
    assert ee_llm.data.Microbatch is Microbatch
    with pytest.raises(AttributeError, match="no attribute 'Macrobatch'"):
        ee_llm.data.Macrobatch  # noqa: B018
