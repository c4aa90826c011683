"""Plans as bytes: what a follower decodes is the plan that its leader runs."""

import json

import pytest

from ee_llm.inference.pipeline_scheduler import Answer, Frontier, PipelinePlan
from ee_llm.inference.request import Draft, Verdict
from ee_llm.inference.sampling import Sampling
from ee_llm.inference.scheduler import Part, Plan, Span
from ee_llm.inference.wire import (
    Passed,
    decode_answers,
    decode_pass,
    decode_plan,
    encode_answers,
    encode_pass,
    encode_plan,
)
from tests.unit.inference.sequences import finish, make_scheduler, make_sequence

PLANS = [
    Plan(
        (Part(0, (Span(3, 0, 5), Span(1, 7, 8))), Part(1, (Span(1, 2, 8), Span(3, 0, 5)), (1, 4))),
        (5, 6, 7, 8, 9, 10),
        (Span(1, 7, 8),),
        ((3, 0, 17), (3, 1, 4)),
    ),
    Plan((Part(2, (Span(0, 0, 1),)),), (), (), ()),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_comes_back_as_it_was(plan: Plan) -> None:
    """Its types too: ranks compare spans, and a list is not equal to a tuple."""
    assert decode_plan(encode_plan(plan)) == plan


def test_plans_of_a_scheduler_come_back_as_they_were() -> None:
    scheduler = make_scheduler(num_blocks=14, max_rows=9)
    for index, strategy in enumerate(("exact", "full", "verify", "propagate")):
        draft = Draft(1, 2) if strategy == "verify" else None
        scheduler.add(make_sequence(f"r{index}", 4, strategy=strategy, draft=draft))
    plans = finish(scheduler, leaving=[0, 3])
    for plan in plans:
        assert decode_plan(encode_plan(plan)) == plan
    assert {len(plan.parts) for plan in plans} >= {1, 2}
    assert any(part.frozen for plan in plans for part in plan.parts)


def test_a_pass_and_its_answers_come_back_as_they_were() -> None:
    sampling = Sampling(0.7, 5, 0.9, 2**40, 0.1, 1.2)
    frontier = Frontier(1, 4, 2, (0.5, None, 0.0), True, False, "margin", sampling, (3, 9))
    plan = PipelinePlan(7, (Span(1, 2, 5),), (3, 9, 9), (frontier,), ((1, 0, 4),))
    for is_late in (False, True):
        passed = Passed.of(Passed([-1], encode_pass(plan)).message(is_late=is_late))
        assert (passed.left, passed.is_late) == ([-1], is_late)
        assert decode_pass(passed.encoded) == plan
    answers = [Answer(0, 1, Verdict(1, 4, True, 9, 0.25, -0.5))]
    assert decode_answers(encode_answers(7, answers)) == (7, answers)


def test_a_message_is_json() -> None:
    """It is read, never executed."""
    assert isinstance(json.loads(encode_plan(PLANS[0])), list)
    for message in (b"\x80\x04K\x01.", b"__import__('os')"):
        with pytest.raises(ValueError):  # noqa: PT011
            decode_plan(message)
