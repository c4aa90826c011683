"""Statistics from parts of the vocabulary, as tensor-parallel ranks compute them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ee_llm.evaluation.row_statistics import RowStatistics, divergence, row_statistics
from ee_llm.inference.choices import Measure
from ee_llm.inference.exits.confidence import OF_LOGITS
from tests.unit.evaluation.models import on_ranks

NUM_ROWS, VOCABULARY = 6, 12


def make(seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(NUM_ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(VOCABULARY, (NUM_ROWS,), generator=generator)


def statistics(logits: Tensor, targets: Tensor, num_ranks: int) -> list[RowStatistics]:
    size = VOCABULARY // num_ranks

    def one(rank: int, gather: Callable[[Tensor], Tensor]) -> RowStatistics:
        part = logits[:, rank * size : (rank + 1) * size]
        return row_statistics(part, targets, rank * size, gather)

    return on_ranks(num_ranks, one)  # type: ignore[return-value]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("scale", [3.0, 3000.0])
def test_statistics_are_those_of_the_softmax(num_ranks: int, scale: float) -> None:
    """Large logits must not overflow."""
    logits, targets = make(0, scale)
    expected = logits.log_softmax(dim=-1)
    for one in statistics(logits, targets, num_ranks):
        torch.testing.assert_close(one.loss, -expected.gather(-1, targets[:, None])[:, 0])
        torch.testing.assert_close(one.confidence, expected.exp().max(dim=-1).values)
        assert torch.equal(one.top, expected.argmax(dim=-1))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_divergence_is_that_of_torch(num_ranks: int) -> None:
    (final, targets), (early, _) = make(0), make(1)
    of_final, of_early = (statistics(logits, targets, num_ranks) for logits in (final, early))
    found = on_ranks(
        num_ranks,
        lambda rank, gather: divergence(of_final[rank].logprobs, of_early[rank].logprobs, gather),
    )
    expected = torch.nn.functional.kl_div(
        early.log_softmax(-1), final.log_softmax(-1), log_target=True, reduction="none"
    ).sum(dim=-1)
    for one in found:
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_of_equal_logits_the_least_id_is_on_top(num_ranks: int) -> None:
    logits = torch.zeros(NUM_ROWS, VOCABULARY, dtype=torch.float64)
    logits[:, [3, 9]] = 1.0
    for one in statistics(logits, torch.zeros(NUM_ROWS, dtype=torch.int64), num_ranks):
        assert one.top.tolist() == [3] * NUM_ROWS


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets = make(0)
    (one,) = statistics(logits.bfloat16(), targets, 1)
    assert one.loss.dtype == torch.float32
    (exact,) = statistics(logits.bfloat16().double(), targets, 1)
    torch.testing.assert_close(one.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("measure", ["max_probability", "entropy", "margin"])
def test_confidence_is_that_of_the_exit_policy(num_ranks: int, measure: Measure) -> None:
    """A calibrated threshold must mean the same in generation."""
    logits, targets = make(3)
    size = VOCABULARY // num_ranks

    def one(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        part = logits[:, rank * size : (rank + 1) * size]
        return row_statistics(part, targets, rank * size, gather, measure).confidence

    expected = OF_LOGITS[measure](logits)
    for found in on_ranks(num_ranks, one):
        torch.testing.assert_close(found, expected)
