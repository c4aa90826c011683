"""Samples: every token is predicted once, masks, positions and deterministic orders."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_llm.data.dataset import (
    Blend,
    RowOptions,
    Windows,
    make_row,
    open_blend,
    split_documents,
)
from ee_llm.data.indexed import IndexedTokens, IndexedWriter
from tests.unit.data.conftest import WriteData

EOD = 99
OPTIONS = RowOptions(eos_token_id=EOD, vocab_size=100)


@settings(deadline=None, max_examples=100)
@given(
    num_documents=st.integers(1, 2_000),
    fractions=st.tuples(*[st.floats(0, 1, allow_subnormal=False)] * 3).filter(any),
)
def test_split(num_documents: int, fractions: tuple[float, ...]):
    """Splits are disjoint, complete, proportional, and not empty if their fraction is not 0."""
    wanted = sum(fraction > 0 for fraction in fractions)
    if num_documents < wanted:
        with pytest.raises(ValueError, match=r"splits, but there are only \d document"):
            split_documents(num_documents, fractions)
        return
    parts = split_documents(num_documents, fractions)
    assert [i for part in parts for i in part] == list(range(num_documents))
    for part, fraction in zip(parts, fractions, strict=True):
        assert (len(part) > 0) == (fraction > 0)
        assert abs(len(part) - fraction / sum(fractions) * num_documents) < 3


def test_split_of_few_documents():
    """Two per cent of ten documents round to 0, which left validation without data."""
    assert split_documents(10, (0.98, 0.02, 0.0)) == [range(9), range(9, 10), range(10, 10)]
    assert split_documents(3, (98, 1, 1)) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize(
    "fractions", [(0, 0, 0), (1.5, -0.5, 0), (math.nan, 1, 0), (math.inf, 1, 0)]
)
def test_invalid_fractions(fractions: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"data\.split = .* must be .*at least 0"):
        split_documents(10, fractions)


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12), seq_length=st.integers(1, 25))
def test_every_token_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int
):
    if sum(lengths) < 2:
        return
    prefix = tmp_path_factory.mktemp("tokens") / "a"
    stream = np.arange(sum(lengths))
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add(stream, lengths)
        writer.commit()
    windows = Windows(IndexedTokens(prefix), range(len(lengths)), seq_length)
    options = RowOptions(eos_token_id=0, vocab_size=1 << 20)
    predicted = []
    for i in range(len(windows)):
        row = make_row(np.asarray(windows[i], dtype=np.int64), seq_length, options)
        assert all(array.shape == (seq_length,) for array in row)
        valid = row.loss_mask == 1
        assert (row.labels[valid] == row.tokens[valid] + 1).all()
        assert (row.tokens[~valid][1:] == 0).all()
        predicted += row.labels[valid].tolist()
    assert predicted == stream[1:].tolist()


def test_row():
    window = np.array([5, EOD, 7, 8, EOD, EOD, 9])
    row = make_row(window, 6, OPTIONS)
    assert row.tokens.tolist() == [5, EOD, 7, 8, EOD, EOD]
    assert row.labels.tolist() == [EOD, 7, 8, EOD, EOD, 9]
    assert row.loss_mask.tolist() == [1, 1, 1, 1, 1, 1]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert [array.dtype for array in row] == [np.int64, np.int64, np.float32, np.int64]


def test_row_with_mask_and_reset():
    """An end-of-document token is predicted and is the last token of its document."""
    window = np.array([5, EOD, 7, 8, EOD, EOD, 9])
    options = RowOptions(EOD, 100, mask_after_eos=True, reset_positions=True)
    row = make_row(window, 6, options)
    assert row.loss_mask.tolist() == [1, 0, 1, 1, 0, 0]
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 0]


def test_short_row():
    """Padding has no loss, including the prediction of the first padding token."""
    row = make_row(np.array([5, 6, 7]), 5, OPTIONS)
    assert row.tokens.tolist() == [5, 6, 7, EOD, EOD]
    assert row.labels.tolist() == [6, 7, EOD, EOD, EOD]
    assert row.loss_mask.tolist() == [1, 1, 0, 0, 0]


def test_rows_do_not_share_memory():
    """Writing to the tokens of a row must not change its labels."""
    row = make_row(np.array([5, 6, 7]), 2, OPTIONS)
    row.tokens[:] = 0
    assert row.labels.tolist() == [6, 7]


def blend_of(prefixes: list[str], seed: int = 0, weights: tuple[float, ...] = ()) -> Blend:
    return open_blend(
        prefixes,
        "train",
        seq_length=4,
        options=OPTIONS,
        seed=seed,
        weights=weights,
        fractions=(1, 0, 0),
    )


def test_epochs_are_permutations(write_data: WriteData):
    """Each epoch has every sample once, in a different order."""
    blend = blend_of([write_data("a", [list(range(90))])])
    size = len(blend)
    assert size == 23
    epochs = [[blend.locate(e * size + i).window for i in range(size)] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_blend_follows_weights_and_epochs(write_data: WriteData):
    """With weights 3 to 1 and equal sizes, the first source completes three epochs per epoch."""
    prefixes = [write_data(name, [list(range(41))]) for name in "ab"]
    blend = blend_of(prefixes, weights=(0.75, 0.25))
    locations = [blend.locate(position) for position in range(40)]
    assert Counter(locations) == {(0, w): 3 for w in range(10)} | {(1, w): 1 for w in range(10)}
    orders = [[w for s, w in locations if s == source] for source in (0, 1)]
    assert orders[0][:10] != orders[1]  # Sources of the same size have different orders.


def test_default_weights_are_sizes(write_data: WriteData):
    blend = blend_of([write_data("a", [list(range(41))]), write_data("b", [list(range(21))])])
    locations = [blend.locate(position) for position in range(len(blend))]
    assert len(set(locations)) == len(blend) == 15


def test_distinct_samples(write_data: WriteData):
    """The small source is exhausted early at these weights; the large one continues."""
    prefixes = [write_data("a", [list(range(81))]), write_data("b", [list(range(9))])]
    blend = blend_of(prefixes, weights=(0.001, 0.999))
    samples = blend.distinct_samples(1_000)
    assert sorted(samples) == [*((0, w) for w in range(20)), *((1, w) for w in range(2))]
    assert samples[:2] == [blend.locate(0), blend.locate(1)]
    assert blend.distinct_samples(7) == samples[:7]


def test_splits_have_disjoint_documents(write_data: WriteData):
    prefix = write_data("a", [[i, i, EOD] for i in range(90)])
    tokens = {}
    for split in ("train", "validation", "test"):
        blend = open_blend(
            [prefix], split, seq_length=3, options=OPTIONS, seed=0, fractions=(0.8, 0.1, 0.1)
        )
        rows = [blend.row(location) for location in blend.distinct_samples(100)]
        tokens[split] = {int(token) for row in rows for token in row.tokens} - {EOD}
    assert tokens["train"] == set(range(72))
    assert tokens["validation"] == set(range(72, 81))
    assert tokens["test"] == set(range(81, 90))


def test_seed_changes_only_the_order_of_the_train_split(write_data: WriteData):
    prefix = write_data("a", [list(range(99)) for _ in range(20)])

    def order(split: str, seed: int) -> list[int]:
        blend = open_blend(
            [prefix], split, seq_length=4, options=OPTIONS, seed=seed, fractions=(0.5, 0.5, 0)
        )
        return [blend.locate(i).window for i in range(50)]

    assert order("train", 1) == order("train", 1) != order("train", 2)
    assert order("validation", 1) == order("validation", 2)
    assert order("validation", 1) != sorted(order("validation", 1))  # The order is not sequential.


@pytest.mark.parametrize("vocab_size", [99, 50])
def test_token_outside_the_vocabulary(write_data: WriteData, vocab_size: int):
    prefix = write_data("a", [[1, 2, 99, 3]])
    options = RowOptions(eos_token_id=0, vocab_size=vocab_size)
    blend = open_blend(
        [prefix], "train", seq_length=8, options=options, seed=0, fractions=(1, 0, 0)
    )
    message = rf"a\.bin: token id 99 .*model\.vocab_size = {vocab_size}\."
    with pytest.raises(ValueError, match=message):
        blend.row(blend.locate(0))


def test_eos_outside_the_vocabulary():
    """The end-of-document token also pads rows."""
    with pytest.raises(ValueError, match=r"model\.vocab_size = 256 .* 256\. Set it to 257"):
        RowOptions(eos_token_id=256, vocab_size=256)


def test_negative_token(tmp_path: Path):
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add([1, -1, 2])
        writer.commit()
    blend = blend_of([str(tmp_path / "a")])
    with pytest.raises(ValueError, match=r"a\.bin: token id -1"):
        blend.row(blend.locate(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefixes": []}, r"data\.prefixes is empty.*'ee-llm data prepare'"),
        ({"prefixes": ["nowhere/x"]}, r"nowhere/x\.idx does not exist"),
        ({"fractions": (0, 1, 0)}, r"data\.split = \[0, 1, 0\] has no train data"),
        ({"fractions": (1, 1)}, r"data\.split = \[1, 1\] has no train data"),
        (
            {"fractions": (0.9, 0.05, 0.05)},
            r"data .*/a: data\.split = .* 3 splits, but there are only 2 document",
        ),
        ({"seq_length": 0}, r"data\.seq_length = 0 must be at least 1"),
        (
            {"weights": (1.0, 2.0)},
            r"data\.weights = .* has 2 values for 1 data\.prefixes",
        ),
        ({"weights": (0.0,)}, r"data\.weights = \[0\.0\] must be .* above 0"),
    ],
)
def test_invalid_options(write_data: WriteData, changes: dict, message: str):
    prefixes = [write_data("a", [[1, 2, 3], [4, 5, 6]])]
    arguments = {
        "prefixes": prefixes, "split": "train", "seq_length": 4, "options": OPTIONS, "seed": 0
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        open_blend(**{**arguments, **changes})


def test_split_with_too_few_tokens(write_data: WriteData):
    prefix = write_data("a", [[1, 2, 3], [4]])
    with pytest.raises(ValueError, match="1 tokens in 1 of 2 documents"):
        open_blend(
            [prefix], "validation", seq_length=4, options=OPTIONS, seed=0, fractions=(0.5, 0.5, 0)
        )
