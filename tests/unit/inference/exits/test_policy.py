"""Confidence measures and the policy that thresholds them."""

import math

import numpy as np
import pytest
import torch

from ee_llm.errors import RequestError
from ee_llm.inference.exits.confidence import OF_LOGITS
from ee_llm.inference.exits.policy import ExitPolicy, make_exit_policy


@pytest.mark.parametrize("measure", OF_LOGITS)
def test_confidence_is_between_a_uniform_and_a_certain_distribution(measure: str) -> None:
    uniform, certain = torch.zeros(8), torch.tensor([100.0] + [0.0] * 7)
    lowest = 1 / 8 if measure == "max_probability" else 0.0
    assert float(OF_LOGITS[measure](uniform)) == pytest.approx(lowest, abs=1e-6)
    assert float(OF_LOGITS[measure](certain)) == pytest.approx(1.0)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    values = torch.stack([OF_LOGITS[measure](rows * scale) for scale in (0.1, 1.0, 4.0, 30.0)])
    assert ((values >= 0) & (values <= 1)).all()
    assert (values.diff(dim=0) > -1e-6).all()  # a sharper distribution is never less confident


def test_measures_of_a_known_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log() + 3.0
    expected = {"max_probability": 0.5, "margin": 0.25, "entropy": 1 - 1.75 / 2}
    for measure, value in expected.items():
        assert float(OF_LOGITS[measure](logits)) == pytest.approx(value, abs=1e-12)
        assert OF_LOGITS[measure](logits).dtype == torch.float64
        assert OF_LOGITS[measure](logits.bfloat16()).dtype == torch.float32


def test_a_token_exits_at_its_threshold_and_never_where_off() -> None:
    policy = ExitPolicy((2, 5), (0.5, None))
    assert policy.exits(2, 0.5)
    assert not policy.exits(2, math.nextafter(0.5, 0))
    assert not policy.exits(5, 1.0)
    assert not policy.exits(3, 1.0)
    assert not policy.without_exits().exits(2, 1.0)


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.0001, math.nan, math.inf])
@pytest.mark.parametrize("boundaries", [(), (2,), (2, 4)])
def test_threshold_outside_its_range_is_refused(bad: float, boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"thresholds: .* is not in \(0, 1\].*'off'"):
        make_exit_policy(boundaries, [bad])


def test_lists_and_numpy_arrays_are_as_good_as_tuples() -> None:
    policy = ExitPolicy((1, 2), (0.5, None))
    for boundaries in ([1, 2], range(1, 3), np.array([1, 2])):
        for thresholds in ([0.5, None], (np.float32(0.5), None)):
            found = ExitPolicy(boundaries, thresholds)
            assert (found, hash(found), found.digest) == (policy, hash(policy), policy.digest)
            assert {type(one) for one in found.boundaries} == {int}
            assert type(found.thresholds[0]) is float
            found.check_fits((1, 2))


@pytest.mark.parametrize(
    "boundaries",
    [(2, 1), (1, 1), (True, 2), (1, 2.5), (1, None), ("1", "2"), 2, "12", None, {1: 2}.items()],
)
def test_boundaries_that_are_not_increasing_integers_are_refused(boundaries: object) -> None:
    with pytest.raises(RequestError, match="boundaries = .* must be integers in increasing order"):
        ExitPolicy(boundaries, (0.5, 0.5))


@pytest.mark.parametrize("thresholds", [(True, 0.5), ("0.5", 0.5), ([0.5], 0.5), 0.5, "ab", None])
def test_thresholds_that_are_no_numbers_are_refused(thresholds: object) -> None:
    with pytest.raises(RequestError, match=r"^thresholds(:| =) "):
        ExitPolicy((1, 2), thresholds)


@pytest.mark.parametrize("measure", [["entropy"], None, {}, "top"])
def test_a_measure_that_does_not_exist_is_refused(measure: object) -> None:
    with pytest.raises(RequestError, match=r"measure .* is unknown"):
        ExitPolicy((1, 2), (0.5, 0.5), measure)


def test_one_threshold_applies_to_all_exits_and_other_counts_are_refused() -> None:
    assert make_exit_policy((2, 4), [0.9]).thresholds == (0.9, 0.9)
    assert make_exit_policy((), [0.9]).thresholds == ()
    assert make_exit_policy((2, 4), [None, 1.0]).thresholds == (None, 1.0)
    for count in (0, 3):
        with pytest.raises(ValueError, match=rf"{count} given for 2 exits at boundaries \[2, 4\]"):
            make_exit_policy((2, 4), [0.5] * count)
    with pytest.raises(ValueError, match=r"'top' .*max_probability"):
        make_exit_policy((2, 4), [0.5], "top")


def test_the_digest_identifies_the_policy() -> None:
    policy = make_exit_policy((2, 4), [0.5, None])
    assert policy.digest == make_exit_policy([2, 4], (0.5, None)).digest
    assert len(policy.digest) == 16
    others = [
        make_exit_policy((2, 4), [math.nextafter(0.5, 1), None]),
        make_exit_policy((2, 4), [None, 0.5]),
        make_exit_policy((2, 5), [0.5, None]),
        make_exit_policy((2, 4), [0.5, None], "margin"),
        policy.without_exits(),
    ]
    assert len({policy.digest, *(other.digest for other in others)}) == 6
    assert make_exit_policy((2,), [1]).digest == make_exit_policy((2,), [1.0]).digest
