"""Samples: every token is predicted once, masks and positions are right, order is pure."""

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
    """Nothing lost, nothing twice, in proportion, and no part that was asked for is empty."""
    wanted = sum(fraction > 0 for fraction in fractions)
    if num_documents < wanted:
        with pytest.raises(ValueError, match=r"parts, but only \d document"):
            split_documents(num_documents, fractions)
        return
    parts = split_documents(num_documents, fractions)
    assert [i for part in parts for i in part] == list(range(num_documents))
    for part, fraction in zip(parts, fractions, strict=True):
        assert (len(part) > 0) == (fraction > 0)
        assert abs(len(part) - fraction / sum(fractions) * num_documents) < 3


def test_split_of_few_documents():
    """Two per cent of ten documents are none when rounded, and validation would have no data."""
    assert split_documents(10, (0.98, 0.02, 0.0)) == [range(9), range(9, 10), range(10, 10)]
    assert split_documents(3, (98, 1, 1)) == [range(1), range(1, 2), range(2, 3)]


@pytest.mark.parametrize("wrong", [(0, 0, 0), (1.5, -0.5, 0), (math.nan, 1, 0), (math.inf, 1, 0)])
def test_split_that_is_none(wrong: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"data\.split = .*: must be at least 0, and not all 0"):
        split_documents(10, wrong)


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
    """An end-of-document token is predicted and belongs to its document; what follows it is new."""
    window = np.array([5, EOD, 7, 8, EOD, EOD, 9])
    options = RowOptions(EOD, 100, mask_after_eos=True, reset_positions=True)
    row = make_row(window, 6, options)
    assert row.loss_mask.tolist() == [1, 0, 1, 1, 0, 0]
    assert row.positions.tolist() == [0, 1, 0, 1, 2, 0]


def test_short_row():
    """Padding has no loss, not even the last token's prediction of the first padding."""
    row = make_row(np.array([5, 6, 7]), 5, OPTIONS)
    assert row.tokens.tolist() == [5, 6, 7, EOD, EOD]
    assert row.labels.tolist() == [6, 7, EOD, EOD, EOD]
    assert row.loss_mask.tolist() == [1, 1, 0, 0, 0]


def test_rows_are_their_own():
    """Writing to the tokens of a row must not write to its labels."""
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
        split=(1, 0, 0),
    )


def test_epochs_are_permutations(write_data: WriteData):
    """Each epoch every sample once, in another order."""
    blend = blend_of([write_data("a", [list(range(90))])])
    size = len(blend)
    assert size == 23
    epochs = [[blend.locate(e * size + i).window for i in range(size)] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_blend_follows_weights_and_epochs(write_data: WriteData):
    """3 to 1 although both are of one size: the first comes to its fourth epoch meanwhile."""
    prefixes = [write_data(name, [list(range(41))]) for name in "ab"]
    blend = blend_of(prefixes, weights=(0.75, 0.25))
    locations = [blend.locate(position) for position in range(40)]
    assert Counter(locations) == {(0, w): 3 for w in range(10)} | {(1, w): 1 for w in range(10)}
    orders = [[w for s, w in locations if s == source] for source in (0, 1)]
    assert orders[0][:10] != orders[1]  # sources of one size have orders of their own


def test_default_weights_are_sizes(write_data: WriteData):
    blend = blend_of([write_data("a", [list(range(41))]), write_data("b", [list(range(21))])])
    locations = [blend.locate(position) for position in range(len(blend))]
    assert len(set(locations)) == len(blend) == 15


def test_once_is_without_repetition(write_data: WriteData):
    """The small source is used up early at these weights, and the large one goes on alone."""
    prefixes = [write_data("a", [list(range(81))]), write_data("b", [list(range(9))])]
    blend = blend_of(prefixes, weights=(0.001, 0.999))
    found = blend.once(1_000)
    assert sorted(found) == [*((0, w) for w in range(20)), *((1, w) for w in range(2))]
    assert found[:2] == [blend.locate(0), blend.locate(1)]
    assert blend.once(7) == found[:7]


def test_parts_share_no_document(write_data: WriteData):
    prefix = write_data("a", [[i, i, EOD] for i in range(90)])
    found = {}
    for part in ("train", "validation", "test"):
        blend = open_blend(
            [prefix], part, seq_length=3, options=OPTIONS, seed=0, split=(0.8, 0.1, 0.1)
        )
        rows = [blend.row(location) for location in blend.once(100)]
        found[part] = {int(token) for row in rows for token in row.tokens} - {EOD}
    assert found["train"] == set(range(72))
    assert found["validation"] == set(range(72, 81))
    assert found["test"] == set(range(81, 90))


def test_seed_orders_the_training_part_only(write_data: WriteData):
    prefix = write_data("a", [list(range(99)) for _ in range(20)])

    def order(part: str, seed: int) -> list[int]:
        blend = open_blend(
            [prefix], part, seq_length=4, options=OPTIONS, seed=seed, split=(0.5, 0.5, 0)
        )
        return [blend.locate(i).window for i in range(50)]

    assert order("train", 1) == order("train", 1) != order("train", 2)
    assert order("validation", 1) == order("validation", 2)
    assert order("validation", 1) != sorted(
        order("validation", 1)
    )  # not one document after another


@pytest.mark.parametrize("vocab_size", [99, 50])
def test_token_beyond_the_vocabulary(write_data: WriteData, vocab_size: int):
    prefix = write_data("a", [[1, 2, 99, 3]])
    options = RowOptions(eos_token_id=0, vocab_size=vocab_size)
    blend = open_blend([prefix], "train", seq_length=8, options=options, seed=0, split=(1, 0, 0))
    message = (
        rf"a\.bin: token id 99 .*beyond the vocabulary, model\.vocab_size = {vocab_size}; prep"
    )
    with pytest.raises(ValueError, match=message):
        blend.row(blend.locate(0))


def test_eos_beyond_the_vocabulary():
    """It is what rows are padded with."""
    with pytest.raises(
        ValueError, match=r"model\.vocab_size = 256: .* 256 is beyond it; set it to 257"
    ):
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
        ({"prefixes": []}, r"data\.prefixes is empty; make data with 'ee-llm data prepare'"),
        ({"prefixes": ["nowhere/x"]}, r"nowhere/x\.idx does not exist"),
        ({"split": (0, 1, 0)}, r"data\.split = \[0, 1, 0\]: has no train part"),
        ({"split": (1, 1)}, r"data\.split = \[1, 1\]: has no train part"),
        (
            {"split": (0.9, 0.05, 0.05)},
            r"data .*/a: data\.split = .*: 3 parts, but only 2 document",
        ),
        ({"seq_length": 0}, r"data\.seq_length = 0: must be at least 1"),
        (
            {"weights": (1.0, 2.0)},
            r"data\.weights = .*: give one weight for each of the 1 data\.pre",
        ),
        ({"weights": (0.0,)}, r"data\.weights = .*every weight must be a number above 0"),
    ],
)
def test_bad_options(write_data: WriteData, changes: dict, message: str):
    prefixes = [write_data("a", [[1, 2, 3], [4, 5, 6]])]
    arguments = {
        "prefixes": prefixes, "part": "train", "seq_length": 4, "options": OPTIONS, "seed": 0
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        open_blend(**{**arguments, **changes})


def test_part_without_anything_to_predict(write_data: WriteData):
    prefix = write_data("a", [[1, 2, 3], [4]])
    with pytest.raises(ValueError, match="1 tokens in 1 of 2 documents, at least 2 are needed"):
        open_blend(
            [prefix], "validation", seq_length=4, options=OPTIONS, seed=0, split=(0.5, 0.5, 0)
        )
