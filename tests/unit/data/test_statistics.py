"""Statistics of prepared data."""

import math
from pathlib import Path

import numpy as np
import pytest

from ee_llm.data import statistics as module
from ee_llm.data.indexed import IndexedWriter
from ee_llm.data.statistics import StatisticsOptions, entropy, statistics, token_counts
from tests.unit.data.conftest import WriteData


def test_entropy():
    """Known values: one outcome, a fair coin, and 1/2, 1/4, 1/4."""
    assert entropy(np.array([0, 3])) == 0
    assert entropy(np.array([50, 0, 0, 50])) == pytest.approx(math.log(2), rel=1e-15)
    assert entropy(np.array([0, 1, 1, 2])) == pytest.approx(1.5 * math.log(2), rel=1e-15)
    assert entropy(np.zeros(0, np.int64)) == 0


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_counts_do_not_depend_on_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """The largest id may be in any chunk."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    tokens = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16)
    tokens[-1] = 3
    assert token_counts(tokens, "a.bin").tolist() == np.bincount(tokens).tolist()
    tokens[0] = 60
    assert token_counts(tokens, "a.bin").tolist() == np.bincount(tokens).tolist()


def test_statistics(write_data: WriteData):
    prefix = write_data("a", [[1, 2, 300], [1, 1]])
    result = statistics(StatisticsOptions(Path(prefix)))
    nats = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
    assert result == (prefix, 2, 5, 3, 300, 3, pytest.approx(nats))
    assert "2 documents of at most 3 tokens, 5 tokens, 3 distinct ids up to 300" in str(result)
    assert f"unigram entropy {nats:.3f} nats/token" in str(result)


@pytest.mark.parametrize("number", [-5, 2**31, 2**40])
def test_numbers_that_are_not_token_ids(tmp_path: Path, number: int):
    """Counting ids up to 2**40 would take 8 TB."""
    with IndexedWriter(tmp_path / "a", np.int64) as writer:
        writer.add([1, number])
        writer.commit()
    with pytest.raises(ValueError, match=rf"a\.bin has {number}, which is not a token id"):
        statistics(StatisticsOptions(tmp_path / "a"))
