"""Test the costs of passes, and the ideal speed-ups against values computed by hand."""

import pytest
import torch

from ee_llm.inference.engine import Engine
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.deferral import LatencyProfile
from tests.unit.inference.models import random_tensors, tiny_config
from tools.bench.decode_costs import (
    Costs,
    best_regime,
    declining,
    ideal,
    levels,
    measure_costs,
    regime,
    shares,
)


def profile(*seconds: float) -> LatencyProfile:
    """Return times that do not depend on the number of rows."""
    return LatencyProfile((1,), tuple((time,) for time in seconds))


def constant_costs(levels: tuple[float, ...], heads: tuple[float, ...]) -> Costs:
    depths = tuple(sum(levels[: index + 1]) for index in range(len(levels)))
    return Costs(
        profile(*levels), profile(*depths), profile(*heads), profile(sum(levels) + heads[-1])
    )


def linear_costs(levels: tuple[float, ...]) -> Costs:
    """Return costs with the same time per row for any number of rows. Heads cost nothing."""
    rows = (1, 2)
    double = [(time, 2 * time) for time in levels]
    depths = [tuple(map(sum, zip(*double[: i + 1], strict=True))) for i in range(len(levels))]
    return Costs(
        LatencyProfile(rows, tuple(double)),
        LatencyProfile(rows, tuple(depths)),
        LatencyProfile((1,), ((0.0,),) * len(levels)),
        LatencyProfile(rows, (depths[-1],)),
    )


def test_levels_end_at_exits_in_use():
    policy = make_exit_policy((2, 4, 6), (None, 0.5, None))
    assert levels(policy) == ((0, 1), (2, 3))
    assert shares((4, 8, 8, 4, 4), policy, num_layers=8) == [3 / 5, 2 / 5]


def test_rows_that_do_not_exit_decline_the_exit():
    assert declining([0.5, 0.2, 0.3]) == pytest.approx([0.5, 0.6])
    assert declining([1.0, 0.0, 0.0]) == [0.0, 0.0]


def test_the_ideal_counts_layers_and_heads_below_the_exit():
    costs = constant_costs((2.0, 2.0, 4.0), heads=(0.5, 0.5, 1.0))
    # A token costs 2.5 at the first exit, 5 at the second, 10 at the final exit; 9 with exits off.
    assert ideal(costs, [0.5, 0.2, 0.3], 4) == pytest.approx(9 / (1.25 + 1.0 + 3.0))
    assert ideal(costs, [0.0, 0.0, 1.0], 4) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("share", "rate", "best"), [(1 / 2, 0.1, 1.38), (1 / 2, 0.3, 1.13), (1 / 4, 0.3, 1.46)]
)
def test_the_regime_ideal_equals_the_closed_form_for_constant_costs(share, rate, best):
    """`share` is the time of a shallow pass relative to the full model."""
    costs = constant_costs((share, 1 - share), heads=(0.0, 0.0))
    found = {}
    for k in (1, 2, 3, 4, 6, 8):
        closed = (1 - (1 - rate) ** k) / rate / (k * share + 1 - share)
        found[k] = regime(costs, [rate], 400, (k,))
        assert found[k] == pytest.approx(closed, rel=1e-3)
    assert max(found.values()) == pytest.approx(best, abs=0.01)
    assert best_regime(costs, [rate], 400) == (max(found.values()), (max(found, key=found.get),))


def test_a_single_sequence_has_a_deep_pass_for_each_declining_row():
    costs = constant_costs((1.0, 3.0), heads=(0.5, 0.5))
    for k in (1, 2, 8):  # there is no other row to wait for
        assert regime(costs, [0.2], 1, (k,)) == pytest.approx(4.5 / (1.5 + 0.2 * 3.5))


def test_a_deep_pass_runs_the_rows_pending_before_the_deferred_one():
    """In compute-bound passes with exact keys and values, exits save nothing: S is 1 for any k."""
    for rates in ([0.2], [0.5, 0.4]):
        costs = linear_costs((1.0, 2.0, 5.0)[: len(rates) + 1])
        for k in (1, 3):
            assert regime(costs, rates, 8, (k,) * len(rates)) == pytest.approx(1.0)


def test_three_levels_nest():
    """The values for two sequences that always or never decline are computed by hand."""
    costs = constant_costs((1.0, 10.0, 100.0), heads=(0.0, 0.0, 0.0))
    assert regime(costs, [1.0, 1.0], 2, (1, 1)) == pytest.approx(1.0)
    # While both are deferred, no row is ready for further passes, so these cost nothing.
    assert regime(costs, [1.0, 1.0], 2, (4, 4)) == pytest.approx(1.0)
    assert regime(costs, [0.0, 0.0], 2, (3, 2)) == pytest.approx(111.0)
    # All exit at the middle level. It runs after two shallow passes, of which only the first has
    # rows.
    assert regime(costs, [1.0, 0.0], 2, (2, 1)) == pytest.approx(111 / 11)
    # All reach the middle level and half of them exit there. Its second run has rows with
    # probability 3/4. With probability 15/16, a sequence is deferred for the last level. This gives
    # 1.5 tokens each in 11 + 8.25 + 93.75.
    assert regime(costs, [1.0, 0.5], 2, (1, 2)) == pytest.approx(111 * 1.5 / 113)


def test_measuring_costs_uses_the_engine_and_restores_its_state():
    config = tiny_config()
    engine = Engine(
        config, random_tensors(config), torch.float64, SchedulerConfig(max_num_seqs=3, block_size=4)
    )
    costs = measure_costs(engine, make_exit_policy((1, 2), (None, 0.5)), 3, 9, num_rounds=2)
    assert costs.levels.rows == (1, 2, 3, 4, 8)
    assert costs.full.rows == costs.heads.rows == costs.depths.rows == (1, 2, 3)
    assert len(costs.levels.seconds) == len(costs.depths.seconds) == len(costs.heads.seconds) == 2
    assert all(time > 0 for times in costs.levels.seconds for time in times)
    engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_available == engine.scheduler_config.num_blocks - 1
