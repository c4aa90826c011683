"""Bins of confidence and the expected calibration error, against a loop over tokens."""

import pytest
import torch

from ee_llm.evaluation.measure import COLUMNS
from ee_llm.evaluation.reliability import Reliability, ReliabilityBin, calibration_error


def columns(confidence: torch.Tensor, agreement: torch.Tensor) -> torch.Tensor:
    """Return `COLUMNS` [4, t] with these values."""
    values = {name: torch.zeros_like(confidence) for name in COLUMNS}
    values |= {"confidence": confidence, "agreement": agreement}
    return torch.stack([values[name] for name in COLUMNS])


def test_bins_equal_those_by_hand() -> None:
    """Two windows; the first and the last bin include 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    confidence[:2] = torch.tensor([0.0, 1.0])
    agreement = (torch.rand(500, generator=generator) < 0.6).double()
    collector = Reliability(num_bins=10)
    final = columns(torch.ones(300), torch.ones(300)).double()
    for part in (slice(0, 300), slice(300, 500)):
        early = columns(confidence[part], agreement[part])
        collector.add({4: early, 12: final[:, : early.shape[1]]})
    assert collector.bins().keys() == {4}
    [found] = collector.bins().values()
    error = 0.0
    for number in range(10):
        inside = [
            token for token in range(500) if min(9, int(float(confidence[token]) * 10)) == number
        ]
        expected = ReliabilityBin(
            len(inside),
            sum(float(confidence[token]) for token in inside) / len(inside),
            sum(float(agreement[token]) for token in inside) / len(inside),
        )
        assert found[number].num_tokens == expected.num_tokens
        assert found[number].confidence == pytest.approx(expected.confidence)
        assert found[number].agreement == pytest.approx(expected.agreement)
        error += len(inside) / 500 * abs(expected.agreement - expected.confidence)
    assert calibration_error(found) == pytest.approx(error)


def test_calibration_error_of_known_bins() -> None:
    """It weighs bins by their tokens, and does not let over- and underconfidence cancel."""
    bins = [ReliabilityBin(30, 0.9, 0.5), ReliabilityBin(10, 0.2, 0.6)]
    assert calibration_error(bins) == pytest.approx(0.75 * 0.4 + 0.25 * 0.4)
    assert calibration_error([]) is None


def test_empty_bins_are_left_out() -> None:
    collector = Reliability(num_bins=4)
    one = columns(torch.tensor([0.9]), torch.tensor([1.0]))
    collector.add({1: one, 2: one})
    assert collector.result() == [{"boundary": 1, "bins": [[1, pytest.approx(0.9), 1.0]]}]
