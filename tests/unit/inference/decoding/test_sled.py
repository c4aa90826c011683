"""SLED on a vocabulary of three tokens, worked by hand from the paper's equations."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ee_llm.inference.decoding.contrast import contrast_logits, contrast_rows
from ee_llm.inference.decoding.settings import SLED
from ee_llm.inference.decoding.sled import evolve

# softmax(FINAL) = (1/2, 1/4, 1/4); softmax(EARLY) = (1/4, 1/2, 1/4).
FINAL = [math.log(2.0), 0.0, 0.0]
EARLY = [0.0, math.log(2.0), 0.0]


def _evolved(early: list[list[float]], settings: SLED, final: list[float] = FINAL) -> Tensor:
    return evolve(torch.tensor([final]), torch.tensor([early]), settings)[0]


def _assert_close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_one_early_layer_by_hand() -> None:
    """With d = early - final = log 2 (-1, 1, 0), q = (1/4, 1/2, 1/4):

    cos(d, q - e_0) = (3/4 + 1/2) / (sqrt 2 sqrt(9/16 + 4/16 + 1/16)) = (5/4) / sqrt(14/8)
    cos(d, q - e_1) = (-1/4 - 1/2) / ..., negative, so 0
    cos(d, q - e_2) = (-1/4 + 1/2) / (sqrt 2 sqrt(1/16 + 4/16 + 9/16)) = (1/4) / sqrt(14/8)

    so m = (5/6, 0, 1/6), and final - rate (p - m) with p = (1/2, 1/4, 1/4).
    """
    _assert_close(
        _evolved([EARLY], SLED(rate=1.0, scale=3)),
        [math.log(2.0) - (1 / 2 - 5 / 6), 0.0 - (1 / 4 - 0.0), 0.0 - (1 / 4 - 1 / 6)],
    )
    _assert_close(
        _evolved([EARLY], SLED(rate=3.0, scale=3)),
        [math.log(2.0) - 3 * (1 / 2 - 5 / 6), -3 / 4, -3 * (1 / 4 - 1 / 6)],
    )


def test_layers_are_weighted_by_the_sum_of_their_similarities() -> None:
    """A second layer that differs by d = log 2 (-1, 0, 1), with q = (1/4, 1/4, 1/2).

    Its similarities are those of the first with tokens 1 and 2 exchanged, so m = (10, 1, 1) / 12.
    """
    other = [0.0, 0.0, math.log(2.0)]
    found = _evolved([EARLY, other], SLED(scale=3))
    _assert_close(found, [math.log(2.0) - (1 / 2 - 10 / 12), -(1 / 4 - 1 / 12), -(1 / 4 - 1 / 12)])


def test_vectors_are_restricted_to_the_evolution_scale() -> None:
    """Tokens 0 and 1 evolve, with d = (-1, -2), q = (2/8, 1/8) and d q = -1/2:

    cos(d, q - e_0) = (-1/2 + 1) / (|d| sqrt(36 + 1) / 8)
    cos(d, q - e_1) = (-1/2 + 2) / (|d| sqrt(4 + 49) / 8)

    The third token, with q = 5/8 and d = log 5, has no part in them, but it has one in p.
    """
    early = [math.log(2.0), 0.0, math.log(5.0)]
    final = [math.log(2.0) + 1.0, 2.0, 0.0]
    first, second = 1 / 2 / math.sqrt(37), 3 / 2 / math.sqrt(53)
    powers = [math.exp(logit) for logit in final]
    expected = [
        logit - (power / sum(powers) - similarity / (first + second))
        for logit, power, similarity in zip(final, powers, (first, second), strict=False)
    ]
    _assert_close(_evolved([early], SLED(scale=2), final), [*expected, -1000.0])


def test_tau_divides_the_step_and_the_logits_of_the_distributions() -> None:
    """At tau = 1/2, softmax(final / tau) = (4, 1, 1) / 6 and q = (1, 4, 1) / 6.

    q - e_0 = (-5, 4, 1) / 6 and q - e_2 = (1, 4, -5) / 6 have the same length, so the cosines are
    in the ratio 9 : 3, and m = (3/4, 0, 1/4).
    """
    found = _evolved([EARLY], SLED(scale=3, tau=0.5))
    _assert_close(found, [math.log(2.0) - 2 * (4 / 6 - 3 / 4), -2 * (1 / 6), -2 * (1 / 6 - 1 / 4)])


def test_released_variant_squares_similarities_over_the_whole_vocabulary() -> None:
    """The cosines of the first test are in the ratio 5 : 1; squared, m = (25, 0, 1) / 26.

    With two tokens, they still cover all three. tau has no effect.
    """
    released = SLED(scale=3, variant="released", tau=0.5)
    _assert_close(
        _evolved([EARLY], released),
        [math.log(2.0) - (1 / 2 - 25 / 26), -1 / 4, -(1 / 4 - 1 / 26)],
    )
    final = [math.log(2.0), -1e-9, 0.0]  # tokens 0 and 2 evolve
    early = [[0.0, math.log(2.0), 0.0]]
    found = _evolved(early, replace(released, scale=2, low_value=-50.0), final)
    _assert_close(found, [math.log(2.0) - (1 / 2 - 25 / 26), -50.0, -(1 / 4 - 1 / 26)])


def test_early_layers_without_evidence_change_nothing() -> None:
    """Equal logits have no direction, and a direction away from all tokens no similarity."""
    _assert_close(_evolved([FINAL], SLED(scale=3)), FINAL)
    _assert_close(_evolved([FINAL], SLED(scale=1)), [math.log(2.0), -1000.0, -1000.0])


def test_released_variant_subtracts_p_without_evidence() -> None:
    """The authors' code then has the target 0: each token loses rate p, with p = (2, 1, 1) / 4."""
    found = _evolved([FINAL], SLED(scale=3, rate=2.0, variant="released"))
    _assert_close(found, [math.log(2.0) - 1.0, -0.5, -0.5])


@pytest.mark.parametrize("num_equal", [3, 50, 2000])
def test_lowest_ids_evolve_among_equal_logits(num_equal: int) -> None:
    """Beside a row without equal logits, which stays the same bit for bit, and one with NaN."""
    tied = torch.zeros(num_equal)
    tied[-1] = 1.0
    plain = torch.arange(num_equal) / num_equal
    final = torch.stack([tied, plain, torch.full_like(tied, math.nan)])
    early = torch.randn(3, 2, num_equal, generator=torch.Generator().manual_seed(0))
    found = evolve(final, early, SLED(scale=2))
    assert (found[0] > -500.0).nonzero()[:, 0].tolist() == [0, num_equal - 1]
    assert torch.equal(found[1], evolve(final[1:2], early[1:2], SLED(scale=2))[0])
    assert found[2].isnan().all()


def test_similarities_of_a_certain_early_layer_are_accurate() -> None:
    """1 - q_0 is 4e-9 there, and the length of q - e_0 is a difference of such numbers."""
    early = [20.0, 0.0, 0.0]
    q = torch.tensor(early, dtype=torch.float64).softmax(0)
    delta = torch.tensor(early, dtype=torch.float64) - torch.tensor(FINAL, dtype=torch.float64)
    cosine = [
        max(float(torch.cosine_similarity(delta, q - one, dim=0, eps=0.0)), 0.0)
        for one in torch.eye(3, dtype=torch.float64)
    ]
    target = torch.tensor(cosine, dtype=torch.float64) / sum(cosine)
    p = torch.tensor(FINAL, dtype=torch.float64).softmax(0)
    expected = torch.tensor(FINAL, dtype=torch.float64) - (p - target)
    _assert_close(_evolved([early], SLED(scale=3)), expected.tolist())


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_rows_of_a_batch_equal_single_rows_bit_for_bit(variant: str) -> None:
    """With settings of their own, and in any precision of the logits."""
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(7, 50, generator=generator, dtype=torch.float64) * 3
    early = torch.randn(7, 4, 50, generator=generator, dtype=torch.float64) * 3
    settings = [SLED(rate=1.0 + row % 3, scale=5 + row % 2, variant=variant) for row in range(7)]
    together = contrast_logits(final, early, settings)
    for row, one in enumerate(settings):
        alone = contrast_logits(final[[row]], early[[row]], [one])[0]
        assert torch.equal(together[row], alone)
        assert torch.equal(evolve(final[[row]], early[[row]], one)[0], alone)


def test_rows_without_settings_keep_their_logits() -> None:
    final, early = torch.randn(3, 5), torch.randn(1, 2, 5)
    settings = [None, SLED(scale=2), None]
    found = contrast_rows(final, [([1], early)], settings)
    assert torch.equal(found[[0, 2]], final[[0, 2]])
    assert torch.equal(found[1], evolve(final[[1]], early, SLED(scale=2))[0].float())


def test_early_logits_that_are_not_finite_make_their_row_nan_alone() -> None:
    final, early = torch.randn(3, 5), torch.randn(3, 2, 5)
    expected = contrast_logits(final, early, [SLED(scale=2)] * 3)
    early[1, 0, 4] = math.inf
    found = contrast_logits(final, early, [SLED(scale=2)] * 3)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
