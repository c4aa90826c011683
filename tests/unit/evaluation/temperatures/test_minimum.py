"""Normalizers of logits at many temperatures and the best one, against a plain softmax."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ee_llm.evaluation.temperatures.logits import SCALES, scaled_normalizers
from ee_llm.evaluation.temperatures.minimum import ScaledTokens
from tests.unit.evaluation.models import on_ranks

NUM_ROWS, VOCABULARY = 400, 24


def make(seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return logits of rows and labels that they predict about as well as they claim."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(NUM_ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * spread
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    return logits, labels


def loss_at(logits: Tensor, labels: Tensor, scale: float) -> float:
    return float(torch.nn.functional.cross_entropy(logits * scale, labels))


def tokens_of(logits: Tensor, labels: Tensor) -> ScaledTokens:
    return ScaledTokens(*scaled_normalizers(logits, labels, 0, lambda part: part))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("spread", [3.0, 3000.0])
def test_normalizers_give_the_softmax_of_scaled_logits(num_ranks: int, spread: float) -> None:
    """Large logits must not overflow, and labels are on any rank."""
    logits, labels = make(spread=spread)
    size = VOCABULARY // num_ranks

    def one(rank: int, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        part = logits[:, rank * size : (rank + 1) * size]
        return scaled_normalizers(part, labels, rank * size, gather)

    for gaps, normalizers in on_ranks(num_ranks, one):  # type: ignore[attr-defined]
        for scale, normalizer in zip(SCALES, normalizers, strict=True):
            expected = (logits * scale).log_softmax(dim=-1)
            torch.testing.assert_close(-normalizer, expected.max(dim=-1).values)
            of_labels = expected.gather(-1, labels[:, None])[:, 0]
            torch.testing.assert_close(-(scale * gaps + normalizer), of_labels)


@pytest.mark.parametrize("planted", [0.21, 0.5, 1.0, 1.7, 5.3])
def test_minimum_beats_its_neighbours(planted: float) -> None:
    """Logits times s are best with another factor, and the product is the same for all s."""
    logits, labels = make()
    best = tokens_of(logits, labels).minimum()
    assert best.scale == pytest.approx(1.0, abs=0.1), "labels are drawn from these distributions"
    scaled = logits * planted
    tokens = tokens_of(scaled, labels)
    found = tokens.minimum()
    assert found.is_bracketed
    assert found.scale * planted == pytest.approx(best.scale, rel=2e-4)
    least = loss_at(scaled, labels, found.scale)
    for factor in (0.995, 1.005):
        assert loss_at(scaled, labels, found.scale * factor) > least
    assert tokens.loss(found.scale) == pytest.approx(least, rel=1e-4)
    assert tokens.loss(1.0) == pytest.approx(loss_at(scaled, labels, 1.0))


def test_confidence_between_the_points_of_the_grid() -> None:
    logits, labels = make()
    tokens = tokens_of(logits, labels)
    for scale in (0.126, 0.3, 0.7, 1.0, 1.1, 3.3, 7.9):
        expected = (logits * scale).softmax(dim=-1).max(dim=-1).values
        torch.testing.assert_close(tokens.confidence(scale), expected, rtol=0, atol=5e-4)


def test_ends_of_the_grid_are_no_minimum() -> None:
    """Labels that are always or never the most probable have no best temperature."""
    logits, _ = make()
    always = tokens_of(logits, logits.argmax(dim=-1)).minimum()
    assert (always.scale, always.is_bracketed) == (max(SCALES), False)
    never = tokens_of(logits, logits.argmin(dim=-1)).minimum()
    assert (never.scale, never.is_bracketed) == (min(SCALES), False)


def test_exit_that_cannot_be_improved_keeps_its_temperature() -> None:
    """All losses are 0, so that every temperature is best."""
    logits = torch.eye(VOCABULARY) * 1e4
    tokens = tokens_of(logits, torch.arange(VOCABULARY))
    assert tokens.loss(1.0) == 0
    found = tokens.minimum()
    assert (found.scale, found.is_bracketed) == (1.0, True)
