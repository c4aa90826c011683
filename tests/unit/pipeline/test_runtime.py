"""The runtime on one rank with all stages: gradients, lifetimes, failures."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ee_llm.errors import PlanError
from ee_llm.pipeline import Action, Plan, Visit, lower, one_f_one_b
from ee_llm.pipeline.runtime import MessageSpec, PipelineError, Runtime
from ee_llm.pipeline.schedules.tuning import tuning_plan
from tests.unit.pipeline.toy import (
    SPEC,
    Shape,
    assert_same_gradients,
    reference,
    stages_of,
)


def one_rank(visits):
    """Return a plan with all stages on rank 0, which finishes microbatches in reverse order."""
    stages = max(visit.depth for visit in visits)
    forwards = [Action.parse(f"{s}F{m}") for m, v in enumerate(visits) for s in range(v.depth)]
    backwards = [
        Action.parse(f"{s}B{m}")
        for m, v in reversed(list(enumerate(visits)))
        for s in range(v.depth - 1, v.first_backward - 1, -1)
    ]
    return Plan(((*forwards, *backwards),), (0,) * stages, tuple(visits))


def run(plan, shape, deferred=True):
    stages = stages_of(shape, plan, 0)
    Runtime(lower(plan), 0, stages, None, SPEC, deferred).step()
    return stages


def gradients(stages):
    return {name: g for stage in stages.values() for name, g in stage.gradients().items()}


words = st.text("imo", max_size=3)


@given(st.lists(words, min_size=1, max_size=4), st.booleans(), st.data())
def test_gradients_equal_one_autograd_call(exits, deferred, data):
    """Covers exits anywhere (several on one tensor, or none), frozen layers and short visits."""
    some_stages = st.frozensets(st.integers(0, len(exits) - 1))
    frozen, dead = data.draw(some_stages), data.draw(some_stages)
    visits = [Visit(len(exits), 0)]
    for _ in range(data.draw(st.integers(0, 3))):
        depth = data.draw(st.integers(1, len(exits)))
        visits.append(Visit(depth, data.draw(st.integers(0, depth))))
    shape, plan = Shape(tuple(exits), frozen, dead), one_rank(visits)
    assert_same_gradients(gradients(run(plan, shape, deferred)), reference(shape, plan))


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("word", ["i", "o", "io", "ii", "oo", "imo", "iioo"])
def test_taps_that_are_the_input_or_the_output_of_the_stage(word, deferred):
    """A tap that is the output gets two gradients; one that is the input is a leaf."""
    shape, plan = Shape(("m", word, "o")), one_rank([Visit(3, 0)] * 2)
    assert_same_gradients(gradients(run(plan, shape, deferred)), reference(shape, plan))


@pytest.mark.parametrize("deferred", [True, False])
def test_local_backwards_reach_the_heads_and_nothing_else(deferred):
    """In EE-Tuning layers have no graph, although they are trainable in this test and their
    gradients would reach the previous stages.
    """
    shape = Shape(("imo", "", "mo"))
    plan = tuning_plan(3, 2, {0, 2})
    actions = sorted((a for r in plan.ranks for a in r), key=lambda a: (a.microbatch, a.stage))
    stages = run(replace(plan, ranks=(tuple(actions),), stage_ranks=(0, 0, 0)), shape, deferred)
    expected = stages_of(shape, replace(plan, stage_ranks=(0, 0, 0)), 0)
    for microbatch in range(2):
        hidden = None
        for stage in expected.values():
            with torch.no_grad():
                hidden, taps = stage.forward(microbatch, hidden)
            for index, tap in enumerate(taps):
                stage.exit_loss(microbatch, index, tap).backward()
    assert_same_gradients(gradients(stages), gradients(expected))
    for stage in stages.values():
        assert stage.grad_modes == [False, False]
        assert all(parameter.grad is None for parameter in stage.layers)
        assert stage.live.peak == (1 if deferred else len(stage.kinds)) * bool(stage.kinds)


def test_gradients_are_accumulated():
    shape, plan = Shape(("o", "o")), one_rank([Visit(2, 0)])
    stages = stages_of(shape, plan, 0)
    runtime = Runtime(lower(plan), 0, stages, None, SPEC)
    runtime.step()
    once = {name: g.clone() for name, g in gradients(stages).items()}
    runtime.step()
    assert_same_gradients(gradients(stages), {name: 2 * g for name, g in once.items()})


def test_tied_weight_gets_the_sum_over_its_stages():
    """The gradient equals the sum of those of untied copies, as after an all-reduce (Prop. 3.1)."""
    shape, plan = Shape(("o", "mo", "o")), one_rank([Visit(3, 0)] * 3)
    untied = stages_of(shape, plan, 0)
    tied = stages_of(shape, plan, 0)
    for stage in (*untied.values(), *tied.values()):
        stage.heads[0].data.copy_(untied[0].heads[0].data)
    for stage in tied.values():
        stage.heads[0] = tied[0].heads[0]
    for stages in (untied, tied):
        Runtime(lower(plan), 0, stages, None, SPEC).step()
    total = sum(stage.heads[0].grad for stage in untied.values())
    torch.testing.assert_close(tied[0].heads[0].grad, total, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tied[1].layers[0].grad, untied[1].layers[0].grad)


def test_only_one_exit_graph_is_alive_with_deferred_exits():
    shape, plan = Shape(("mo", "o")), one_rank([Visit(2, 0)] * 3)
    for deferred, peaks in ((True, [1, 1]), (False, [6, 3])):
        stages = run(plan, shape, deferred)
        assert [stage.live.peak for stage in stages.values()] == peaks
        assert [stage.live.total for stage in stages.values()] == [6, 3]
        assert not any(stage.live.alive for stage in stages.values())


@pytest.mark.parametrize("deferred", [True, False])
def test_without_a_backward_there_is_no_graph(deferred):
    shape, plan = Shape(("o", "imo")), one_rank([Visit(2, 2)] * 2)
    stages = run(plan, shape, deferred)
    assert [stage.grad_modes for stage in stages.values()] == [[False, False]] * 2
    assert [stage.live.total for stage in stages.values()] == [2, 6]
    assert all(stage.live.peak <= 1 for stage in stages.values())
    assert all(gradient is None for gradient in gradients(stages).values())


@pytest.mark.parametrize("deferred", [True, False])
def test_training_actions_build_a_graph_in_any_grad_mode(deferred):
    shape, plan = Shape(("o", "o")), one_rank([Visit(2, 0)])
    with torch.no_grad():
        stages = run(plan, shape, deferred)
    assert_same_gradients(gradients(stages), reference(shape, plan))


class Adds:
    """x + w keeps nothing for its backward, so only the runtime could keep its output alive."""

    def __init__(self):
        self.weight = torch.zeros(SPEC.shape, dtype=SPEC.dtype, requires_grad=True)
        self.outputs = []
        self.alive_at_start = []

    def forward(self, microbatch, hidden):
        self.alive_at_start.append(sum(output() is not None for output in self.outputs))
        output = self.weight + (0 if hidden is None else hidden)
        self.outputs.append(weakref.ref(output))
        return output, ()

    def exit_loss(self, microbatch, index, tap):
        raise AssertionError("no exits here")


def test_outputs_are_freed_after_their_forward():
    """The runtime keeps the graph edge of the output, not its tensor (four are in flight)."""
    stages = {0: Adds(), 1: Adds()}
    Runtime(lower(one_rank([Visit(2, 0)] * 4)), 0, stages, None, SPEC).step()
    assert [stage.alive_at_start for stage in stages.values()] == [[0, 0, 0, 0]] * 2


def test_failure_is_shown_in_the_plan_and_leaves_no_state():
    shape, plan = Shape(("o", "o")), one_rank([Visit(2, 0)] * 2)
    stages = stages_of(shape, plan, 0)
    runtime = Runtime(lower(plan), 0, stages, None, SPEC, deferred=False)
    exit_loss = stages[1].exit_loss

    def broken(microbatch, index, tap):
        if microbatch == 1:
            raise FloatingPointError("no such number")
        return exit_loss(microbatch, index, tap)

    stages[1].exit_loss = broken
    with pytest.raises(
        PipelineError, match=r"(?s)rank 0 failed at 1F1: FloatingPointError: no such.*>1F1<"
    ) as caught:
        runtime.step()
    assert isinstance(caught.value.__cause__, FloatingPointError)
    del caught
    gc.collect()
    assert not any(stage.live.alive for stage in stages.values())
    stages[1].exit_loss = exit_loss
    for stage in stages.values():
        stage.zero_grad()
    runtime.step()
    assert_same_gradients(gradients(stages), reference(shape, plan))


def test_output_of_another_shape_is_an_error():
    shape, plan = Shape(("", "o")), one_rank([Visit(2, 0)])
    wide = MessageSpec((3, 6), torch.float64, torch.device("cpu"))
    runtime = Runtime(lower(plan), 0, stages_of(shape, plan, 0), None, wide)
    with pytest.raises(PipelineError, match=r"output is \(3, 5\) torch.float64, .* \(3, 6\)"):
        runtime.step()


def test_stages_and_plan_must_fit():
    shape, plan = Shape(("", "o")), one_f_one_b(2, 1)
    with pytest.raises(ValueError, match=r"stages \[1\] are not those of rank 0: pass \[0\]"):
        Runtime(lower(plan), 0, stages_of(shape, plan, 1), None, SPEC)
    unproved = Plan(lower(plan).ranks, plan.stage_ranks, plan.visits)
    for refused in (plan, unproved):
        with pytest.raises(PlanError, match="the plan is not lowered"):
            Runtime(refused, 0, stages_of(shape, plan, 0), None, SPEC)
