"""The plans of EE-Tuning: sound; without distillation, one microbatch at a time."""

import itertools
from pathlib import Path

import pytest

from ee_llm.config import load_config
from ee_llm.pipeline.lower import lower
from ee_llm.pipeline.plan import Op
from ee_llm.pipeline.schedules.scaling import unbiased_scaling
from ee_llm.pipeline.schedules.tuning import distillation_plan, tuning_plan
from ee_llm.pipeline.selection import select_plan
from ee_llm.pipeline.simulate import Costs, PieceCost, StageCost, grid, simulate

SIZES = [
    (num_stages, num_microbatches, exits)
    for num_stages, num_microbatches in itertools.product((1, 2, 3, 4), (1, 2, 5, 9))
    for exits in ({num_stages - 1}, {0}, {0, num_stages - 1}, set(range(num_stages)))
]


@pytest.mark.parametrize(("num_stages", "num_microbatches", "exits"), SIZES)
def test_plan_is_sound_and_has_no_backward_messages(num_stages, num_microbatches, exits):
    plan = lower(tuning_plan(num_stages, num_microbatches, exits))
    ops = {action.op for actions in plan.ranks for action in actions}
    assert not ops & {Op.SEND_BACKWARD, Op.RECV_BACKWARD, Op.WEIGHT}
    for stage, actions in enumerate(plan.ranks):
        computed = [a for a in actions if a.op.computes]
        expected = [Op.FORWARD, *[Op.BACKWARD] * (stage in exits)] * num_microbatches
        assert [a.op for a in computed] == expected
    assert set(plan.local_backwards) == exits


def test_output_is_sent_before_exits_are_computed():
    """Otherwise every later stage would wait for the exits."""
    plan = lower(tuning_plan(3, 4, {0, 2}))
    for step, action in enumerate(plan.ranks[0]):
        if action.op is Op.BACKWARD:
            before = plan.ranks[0][:step]
            assert action._replace(op=Op.SEND_FORWARD) in before
    assert str(plan.without_communication().ranks[0][:4]) == "(0F0, 0B0, 0F1, 0B1)"
    assert plan.without_communication() == tuning_plan(3, 4, {0, 2})


def test_losses_and_gradients_count_once():
    scaling = unbiased_scaling(tuning_plan(3, 4, {0, 2}))
    assert {f for losses in scaling.losses for f in losses} == {1.0}
    assert scaling.gradients == (1.0, 1.0, 1.0)


def test_time_and_memory():
    """Stages take 1 and exits 3: the time is the fill of the pipeline plus the slowest stage.

    One microbatch and one exit's logits are alive at a time, where 1F1B keeps P - i of them.
    """
    stages = (StageCost(1, 0, (PieceCost(1, 2),)), StageCost(1, 0), StageCost(1, 0))
    last = StageCost(1, 0, (PieceCost(1, 2),))
    found = simulate(tuning_plan(4, 10, {0, 3}), Costs((*stages, last)))
    assert found.makespan == 3 * 1 + 10 * (1 + 3)
    assert found.peak_activations == (1, 1, 1, 1)
    assert found.peak_exit_logits == (1, 0, 0, 1)


@pytest.mark.parametrize("exits", [set(), {2}, {-1}])
def test_exits_without_a_stage_are_errors(exits):
    with pytest.raises(ValueError, match="exit_stages = .* from 0 to 1"):
        tuning_plan(2, 4, exits)


def test_tuning_runs_use_this_plan():
    options = {
        "model.shape": "llama-tiny",
        "tuning.checkpoint": "runs/a",
        "exits.boundaries": (2, 6),
        "parallel.pipeline": 3,
    }
    config = load_config(None, options)
    assert select_plan(config, 5) == tuning_plan(3, 5, {0, 2})
    distilled = load_config(None, options | {"tuning.objective": "both"})
    assert select_plan(distilled, 5) == distillation_plan(3, 5)


@pytest.mark.parametrize(
    ("num_stages", "num_microbatches"), [*itertools.product((1, 2, 4), (1, 5))]
)
def test_distillation_returns_the_last_output_to_all_stages(num_stages, num_microbatches):
    plan = lower(distillation_plan(num_stages, num_microbatches))
    assert (plan.distills, plan.is_frozen, plan.splits_backward) == (True, True, False)
    for stage, actions in enumerate(plan.ranks):
        sends = [a.microbatch for a in actions if a.op is Op.SEND_BACKWARD]
        assert sends == [*range(num_microbatches)] * (stage > 0)
        for microbatch in range(num_microbatches):
            order = [a.op for a in actions if a.microbatch == microbatch and a.op.computes]
            assert order == [Op.FORWARD, Op.BACKWARD]
    assert plan.without_communication() == distillation_plan(num_stages, num_microbatches)
    scaling = unbiased_scaling(plan)
    assert {f for losses in scaling.losses for f in losses} == {1.0}
    assert set(scaling.gradients) == {1.0}


def test_distillation_keeps_inputs_of_exits_until_the_last_stage_is_done():
    """Stages take 1 and the exit of the first one 3: the slowest stage sets the pace."""
    stages = (StageCost(1, 0, (PieceCost(1, 2),)), StageCost(1, 0), StageCost(1, 0))
    found = simulate(distillation_plan(3, 10), Costs(stages))
    assert found.makespan == 10 * (1 + 3)
    assert found.peak_activations == (3, 2, 1)
    assert found.peak_exit_logits == (1, 0, 0)
    one = simulate(distillation_plan(3, 1), Costs(stages))
    assert one.makespan == 1 + 1 + 1 + 3, "the exit waits for the last stage"


def test_documentation_shows_the_plan():
    page = Path(__file__).resolve().parents[4] / "docs" / "how-to" / "tune.md"
    assert f"```\n{grid(tuning_plan(3, 3, {0, 2}))}\n```" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("num_stages", "num_microbatches", "exits"), SIZES)
def test_stage_without_exits_does_not_run_far_ahead(num_stages, num_microbatches, exits):
    """Otherwise its neighbour would post a receive, with a buffer, for each of its messages."""
    for actions in lower(tuning_plan(num_stages, num_microbatches, exits)).ranks:
        posted, most = 0, 0
        for action in actions:
            posted += (action.op is Op.RECV_FORWARD) - (action.op is Op.FORWARD)
            most = max(most, posted)
        assert most <= 2
