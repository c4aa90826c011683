"""Averages and their errors: by the formula, and over many random samples."""

import math

import pytest
import torch

from ee_llm.evaluation.averages import BLOCK, MIN_BLOCKS, Average, student_quantile


def average(*windows: torch.Tensor) -> Average:
    found = Average()
    for window in windows:
        found.add(window.double())
    return found


def test_equal_blocks_have_the_error_of_the_mean_of_their_means() -> None:
    values = torch.randn(20 * BLOCK, generator=torch.Generator().manual_seed(0)).double()
    found = average(*values.split(4 * BLOCK)).estimate()
    means = values.view(20, BLOCK).mean(dim=1)
    assert found.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.error == pytest.approx(float(means.std()) / math.sqrt(20), rel=1e-12)


def test_short_texts_have_no_error() -> None:
    values = torch.arange((MIN_BLOCKS - 1) * BLOCK)
    found = average(values).estimate()
    assert found.value == pytest.approx(float(values.double().mean()))
    assert (found.error, found.margin) == (None, None)
    assert average(values, values[:1]).estimate().error is not None


@pytest.mark.parametrize("length", [1, 50, BLOCK, 300])
def test_blocks_continue_in_the_next_window(length: int) -> None:
    values = torch.randn(10 * BLOCK + 30, generator=torch.Generator().manual_seed(0))
    found, whole = average(*values.split(length)).estimate(), average(values).estimate()
    assert found.value == pytest.approx(whole.value, rel=1e-12)
    assert found.error == pytest.approx(whole.error, rel=1e-12)


@pytest.mark.parametrize("length", [16, 50, 12 * BLOCK])
def test_interval_has_its_nominal_coverage(length: int) -> None:
    """Neighbours are correlated, so the formula for independent positions would be wrong.

    So are neighbouring windows of `length` tokens.
    """
    generator = torch.Generator().manual_seed(1)
    runs, blocks = 400, 12
    hits = naive_hits = 0
    for _ in range(runs):
        common = torch.randn(blocks * BLOCK // 32, generator=generator).repeat_interleave(32)
        values = (common + 0.5 * torch.randn(blocks * BLOCK, generator=generator)).double()
        found = average(*values.split(length)).estimate()
        assert found.margin is not None
        hits += abs(found.value) < found.margin
        naive_hits += abs(found.value) < 1.96 * float(values.std()) / math.sqrt(len(values))
    assert 0.92 < hits / runs < 0.98
    assert naive_hits / runs < 0.6


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [
        (1, 12.706205),
        (3, 3.182446),
        (6, 2.446912),
        (7, 2.364624),
        (10, 2.228139),
        (30, 2.042272),
        (10**6, 1.959966),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_quantile(freedom) == pytest.approx(expected, abs=2e-4)
