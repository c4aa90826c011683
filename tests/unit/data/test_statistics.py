"""Figures of prepared data."""

import math
from pathlib import Path

import numpy as np
import pytest

from ee_llm.data import statistics as module
from ee_llm.data.indexed import IndexedWriter
from ee_llm.data.statistics import StatisticsOptions, statistics, token_counts, unigram_entropy
from tests.unit.data.conftest import WriteData


def test_entropy():
    """By hand: all alike, a fair coin, and 1/2, 1/4, 1/4."""
    assert unigram_entropy(np.array([7, 7, 7])) == 0
    assert unigram_entropy(np.array([0, 9] * 50)) == pytest.approx(math.log(2), rel=1e-15)
    assert unigram_entropy(np.array([3, 1, 3, 2])) == pytest.approx(1.5 * math.log(2), rel=1e-15)
    assert unigram_entropy(np.zeros(0, np.uint16)) == 0


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """The largest id may come in any chunk."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    tokens = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16)
    tokens[-1] = 3
    assert token_counts(tokens).tolist() == np.bincount(tokens).tolist()
    tokens[0] = 60
    assert token_counts(tokens).tolist() == np.bincount(tokens).tolist()


def test_statistics(write_data: WriteData):
    prefix = write_data("a", [[1, 2, 300], [1, 1]])
    found = statistics(StatisticsOptions(Path(prefix)))
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
    assert found == (prefix, 2, 5, 3, 300, 3, pytest.approx(entropy))
    assert "2 documents of at most 3 tokens, 5 tokens, 3 different ids up to 300" in str(found)
    assert f"unigram entropy {entropy:.3f} nats/token" in str(found)


def test_negative_ids(tmp_path: Path):
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add([1, -5])
        writer.commit()
    with pytest.raises(ValueError, match="token id -5"):
        statistics(StatisticsOptions(tmp_path / "a"))
