"""Outcomes of thresholds, the search for them, and the guarantee over resamplings."""

import pytest
import torch

from ee_llm.errors import DataError
from ee_llm.evaluation.calibration.choose import check_size, choose
from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.search import Costs, Point, find_path
from tests.unit.evaluation.calibration.synthetic import COSTS, make_records

SMALL = Records(
    (2, 4),
    torch.tensor([[0.9, 0.4, 0.6, 0.1], [0.2, 0.8, 0.9, 0.3]]),
    torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]),
    torch.tensor([0, 0, 1, 1]),
)


def test_tokens_take_the_first_confident_exit() -> None:
    outcome = SMALL.outcome((0.5, 0.7))
    assert outcome.exits.tolist() == [0, 1, 0, 2]
    assert outcome.losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert SMALL.window_losses(outcome.losses).tolist() == [0.5, 0.5]
    assert SMALL.outcome((None, 0.9)).exits.tolist() == [2, 2, 1, 2]
    assert SMALL.outcome((None, None)).losses.sum() == 0


def test_costs_count_the_heads_up_to_a_tokens_exit() -> None:
    costs = Costs((2, 4), num_layers=6, head=0.5)
    exits = torch.tensor([0, 1, 2])
    assert costs.of(exits, (0.5, 0.5)).tolist() == [2.5, 5.0, 7.5]
    assert costs.of(exits, (None, 0.5)).tolist() == [2.0, 4.5, 7.0]
    assert costs.full == 6.5


def test_the_final_head_may_cost_less() -> None:
    """It has no translator, MLP or block."""
    costs = Costs((2, 4), num_layers=6, head=1.5, final_head=0.25)
    exits = torch.tensor([0, 1, 2])
    assert costs.of(exits, (0.5, 0.5)).tolist() == [3.5, 7.0, 6 + 2 * 1.5 + 0.25]
    assert costs.of(exits, (None, None))[2] == costs.full == 6.25
    hidden = Costs((2, 4), 6, 1.5, "gate", 0.25)
    assert hidden.of(exits, (0.5, 0.5)).tolist() == [3.5, 5.5, 6.25]


def test_a_part_has_the_chosen_windows() -> None:
    part = SMALL.part(torch.tensor([1, 1]))
    assert part.windows.tolist() == [0, 0, 1, 1]
    assert part.confidence[0].tolist() == pytest.approx([0.6, 0.1, 0.6, 0.1])
    assert part.num_windows == 2


def test_the_path_starts_without_exits_and_loses_ever_more() -> None:
    path = find_path(make_records(200, 0), COSTS, 0.02)
    assert path[0].thresholds == (None, None)
    assert path[0].cost == COSTS.full
    losses = [point.loss for point in path]
    assert losses == sorted(losses)
    assert losses[-1] > 0.02


def test_an_exit_that_costs_more_than_it_saves_is_off() -> None:
    """A head of 100 layers can only be worth it for the final exit."""
    path = find_path(make_records(200, 0), Costs((8, 16), num_layers=24, head=100.0), 0.02)
    assert [point.thresholds for point in path] == [(None, None)]


@pytest.mark.thorough
def test_risk_is_exceeded_no_more_often_than_stated_over_200_resamplings() -> None:
    """The true risk of each choice is known from a much larger text."""
    limit, delta = 0.05, 0.2
    truth = make_records(3000, 10_000)
    exceeded, saved = 0, 0.0
    for seed in range(200):
        records = make_records(150, seed, length=32)
        thresholds = choose(records, COSTS, limit, delta, seed).thresholds
        outcome = truth.outcome(thresholds)
        exceeded += float(outcome.losses.mean()) > limit
        saved += COSTS.full - float(COSTS.of(outcome.exits, thresholds).mean())
    assert exceeded / 200 <= delta
    assert saved / 200 > 2, "the guarantee must not be that of a policy without exits"


def test_without_confident_exits_all_are_off() -> None:
    """Wrong exits that are certain leave nothing to choose: the calibration fails closed."""
    records = make_records(200, 0)
    wrong = Records(
        records.boundaries,
        torch.ones_like(records.confidence),
        torch.ones_like(records.losses),
        records.windows,
    )
    choice = choose(wrong, COSTS, 0.05, 0.05)
    assert choice.thresholds == (None, None)
    assert (choice.loss, choice.p_value, choice.cost) == (0.0, None, COSTS.full)
    assert choice.shares == (0.0, 0.0, 1.0)
    assert choice.least_final_share == pytest.approx(0.95)


def test_the_cheapest_thresholds_that_pass_are_chosen() -> None:
    """Not the last ones that pass: the first exits of a path can cost more than they save."""
    records = make_records(400, 0)
    off, safe, safer = (None, None), (None, 0.995), (None, 0.999)
    risky = (1e-9, 1e-9)

    def chosen(*path: tuple[tuple[float | None, ...], float]) -> tuple[float | None, ...]:
        points = [Point(thresholds, 0.0, cost) for thresholds, cost in path]
        found = choose(records, COSTS, 0.1, 0.1, find=lambda *_: points)
        assert (found.p_value is None) == (found.thresholds == off)
        return found.thresholds

    assert chosen((off, 25.0), (safer, 26.0), (risky, 9.0)) == off
    assert chosen((off, 25.0), (safer, 23.0), (safe, 24.0), (risky, 9.0)) == safer
    assert chosen((off, 25.0), (safer, 24.0), (safe, 23.0)) == safe


def test_a_text_that_is_too_short_is_refused_with_the_number_of_windows() -> None:
    with pytest.raises(
        DataError, match=r"100 windows, too few for risk = 0.01 .* 7\d\d are needed"
    ):
        choose(make_records(100, 0), COSTS, 0.01, 0.05)


def test_too_few_questions_are_not_told_to_be_longer() -> None:
    with pytest.raises(DataError) as error:
        check_size(1, 0.05, 0.05, num_tokens=9, what="questions that the final exit answers right")
    assert "140 are needed. Give more questions that the final exit answers right, or" in str(
        error.value
    )
