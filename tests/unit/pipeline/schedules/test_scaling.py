"""Filled bubbles do not change the expected gradient (enumerated, in float64, to 1e-12)."""

import dataclasses
import itertools

import pytest
import torch

from ee_llm.pipeline import Plan, Visit, lower, one_f_one_b
from ee_llm.pipeline.runtime import Runtime
from ee_llm.pipeline.schedules.bubble_filling import cooldown_visits, filled_1f1b, warmup_visits
from ee_llm.pipeline.schedules.scaling import Scaling, unbiased_scaling
from ee_llm.pipeline.simulate import timeline
from tests.unit.pipeline.toy import SPEC, Shape, ToyStage

RATIO = 0.5


class Assigned(ToyStage):
    """A toy stage that maps the microbatches of the plan to other samples."""

    samples: tuple[int, ...]
    scaling: Scaling

    def forward(self, microbatch, hidden):
        return super().forward(self.samples[microbatch], hidden)

    def exit_loss(self, microbatch, index, tap):
        loss = super().exit_loss(self.samples[microbatch], index, tap)
        return loss * self.scaling.losses[self.stage][microbatch] / len(self.samples)


def gradients(plan, shape, scaling, samples):
    """Return every parameter's gradient if the plan's microbatches are `samples`."""
    plan = dataclasses.replace(  # all stages on one rank, in an order that the plan allows
        plan, ranks=(in_time(plan),), stage_ranks=(0,) * plan.num_stages
    )
    stages = {stage: Assigned(stage, shape) for stage in range(plan.num_stages)}
    for stage in stages.values():
        stage.samples, stage.scaling = samples, scaling
    Runtime(lower(plan), 0, stages, None, SPEC).step()
    return {
        name: torch.zeros(()) if g is None else g * scaling.gradients[number]
        for number, stage in stages.items()
        for name, g in stage.gradients().items()
    }


def in_time(plan):
    spans = [span for rank in timeline(plan).ranks for span in rank]
    return tuple(span.action for span in sorted(spans, key=lambda s: (s.start, s.action)))


def role_assignments(plan):
    """Return all assignments of samples to visits, up to the order among equal visits."""
    count = len(plan.visits)
    roles = sorted(set(plan.visits))
    groups = [[m for m, visit in enumerate(plan.visits) if visit == role] for role in roles]

    def deal(left, groups):
        if not groups:
            yield {}
            return
        for chosen in itertools.combinations(left, len(groups[0])):
            rest = [sample for sample in left if sample not in chosen]
            for others in deal(rest, groups[1:]):
                yield dict(zip(groups[0], chosen, strict=True)) | others

    for roles_of in deal(list(range(count)), groups):
        yield tuple(roles_of[microbatch] for microbatch in range(count))


def bias(plan, shape, scaling):
    """Return the largest relative error of the mean over assignments, over all parameters."""
    count = len(plan.visits)
    ordinary = one_f_one_b(plan.num_stages, count)
    plain = gradients(ordinary, shape, unbiased_scaling(ordinary), tuple(range(count)))
    found = [gradients(plan, shape, scaling, samples) for samples in role_assignments(plan)]
    worst = 0.0
    for name, expected in plain.items():
        mean = torch.stack([g[name].expand_as(expected) for g in found]).mean(dim=0)
        scale = expected.abs().max().clamp_min(1e-9)
        worst = max(worst, float((mean - expected).abs().max() / scale))
    return worst


# Exits on different stages, at the stage's input (pre), middle and output (post).
SHAPE = Shape(("mo", "i", "o", "o"))
PARTS = {"warm-up": (2, 0), "cool-down": (0, 2), "both": (2, 2), "one each": (1, 1)}


def plan_of(part):
    warmup, cooldown = PARTS[part]
    return filled_1f1b(
        4, 2, warmup_visits(4, warmup, RATIO, [0, 1, 2, 3]), cooldown_visits(4, cooldown, RATIO)
    )


@pytest.mark.thorough
@pytest.mark.parametrize("part", PARTS)
def test_mean_over_all_assignments_is_the_unscaled_gradient(part):
    plan = plan_of(part)
    assert bias(plan, SHAPE, unbiased_scaling(plan)) < 1e-12


@pytest.mark.parametrize("part", ["warm-up", "cool-down", "one each"])
def test_without_rescaling_the_gradient_is_biased(part):
    """The released EE-LLM divides every loss by one number, which leaves this bias."""
    plan = plan_of(part)
    count = len(plan.visits)
    flat = Scaling(((count / 2,) * count,) * 4, (1.0,) * 4)
    assert bias(plan, SHAPE, flat) > 1e-2
    found = unbiased_scaling(plan)
    if PARTS[part][0]:
        flat_losses = dataclasses.replace(found, losses=((count / 2,) * count,) * 4)
        assert bias(plan, SHAPE, flat_losses) > 1e-2
    if PARTS[part][1]:
        assert bias(plan, SHAPE, dataclasses.replace(found, gradients=(1.0,) * 4)) > 1e-2


def test_plan_without_fills_is_not_rescaled():
    assert unbiased_scaling(one_f_one_b(3, 5)) == Scaling(((1.0,) * 5,) * 3, (1.0,) * 3)


def test_the_papers_factors_with_one_fill():
    """EE-LLM, C.2: B / (B + 1) for the losses, or the gradients, of the stages that it visits."""
    warmup = unbiased_scaling(filled_1f1b(4, 3, (Visit(1, 0),), ()))
    assert warmup.losses == (
        (1.0,) * 4,
        *((4 / 3,) * 4,) * 3,
    )  # the mean over 4, then over 3 microbatches
    assert warmup.gradients == (1.0,) * 4
    cooldown = unbiased_scaling(filled_1f1b(4, 3, (), (Visit(4, 2),)))
    assert cooldown.gradients == (1.0, 1.0, 3 / 4, 3 / 4)
    assert cooldown.losses == ((4 / 3,) * 4,) * 4


def test_plan_without_full_visits_is_an_error():
    with pytest.raises(ValueError, match="visits all stages forward and backward"):
        unbiased_scaling(Plan((), (0, 1), (Visit(2, 1),)))
