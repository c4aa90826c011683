"""The p-value by hand, and how often it rejects a true hypothesis."""

import math

import pytest
import torch

from ee_llm.evaluation.calibration.risk import NUM_STAKES, p_value, samples_needed


def test_capital_of_two_losses_worked_by_hand() -> None:
    """At a limit of 1/2, the stakes are 2, 1, 1/2, ...; the first capital of 2^-k is halved."""
    shares = [0.5**k for k in range(NUM_STAKES)]
    total = sum(shares)
    capital = sum(s / total * (1 + 2 * s * 0.5) * (1 + 2 * s * 0.25) for s in shares)
    assert p_value([0.0, 0.25], 0.5) == pytest.approx(1 / capital, rel=1e-12)
    assert p_value([0.25, 0.0], 0.5) == pytest.approx(1 / capital, rel=1e-12)


def test_a_loss_of_one_ruins_the_largest_stake_only() -> None:
    shares = [0.5**k for k in range(NUM_STAKES)]
    capital = sum(s / sum(shares) * (1 - s) * (1 + s) ** 9 for s in shares)
    assert p_value([1.0, *[0.0] * 9], 0.5) == pytest.approx(1 / capital, rel=1e-12)


@pytest.mark.parametrize("distribution", ["binary", "spread", "rare"])
def test_a_true_hypothesis_is_rejected_no_more_often_than_stated(distribution: str) -> None:
    """The mean is at the limit exactly, the hardest case; 2,000 samples of 300 losses."""
    limit, delta, count = 0.05, 0.1, 2000
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(count, 300, generator=generator, dtype=torch.float64)
    losses = {
        "binary": (uniform < limit).double(),
        "spread": uniform * 2 * limit,
        "rare": (uniform < limit / 0.6).double() * 0.6,
    }[distribution]
    assert losses.mean() == pytest.approx(limit, rel=0.05)
    rejected = sum(p_value(row, limit) <= delta for row in losses) / count
    assert rejected <= delta + 3 * math.sqrt(delta / count)


def test_a_false_hypothesis_is_rejected() -> None:
    """Means of windows vary little, so that few of them are enough."""
    losses = 0.01 * torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert p_value(losses, 0.02) < 0.1
    assert p_value(losses, 0.004) == 1.0


@pytest.mark.parametrize(("limit", "delta"), [(0.05, 0.05), (0.01, 0.05), (0.01, 0.001)])
def test_samples_needed_are_those_of_a_perfect_text(limit: float, delta: float) -> None:
    count = samples_needed(limit, delta)
    assert p_value(torch.zeros(count), limit) <= delta
    assert p_value(torch.zeros(int(count * 0.95)), limit) > delta


@pytest.mark.parametrize("losses", [[-0.1], [1.1], [math.nan]])
def test_losses_outside_the_range_are_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="outside"):
        p_value(losses, 0.1)
