"""Plans as bytes: what a follower decodes is the plan that its leader runs."""

import json

import pytest

from ee_llm.inference.execution.wire import (
    PassEnvelope,
    decode_pass,
    decode_results,
    decode_scheduler_output,
    encode_pass,
    encode_results,
    encode_scheduler_output,
)
from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling.sampler import SamplingParams
from ee_llm.inference.scheduling.pipeline_scheduler import (
    Frontier,
    PipelineSchedulerOutput,
    StageResult,
)
from ee_llm.inference.scheduling.scheduler import SchedulerOutput, SegmentStep, TokenRange
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import finish, make_scheduler, make_sequence

PLANS = [
    SchedulerOutput(
        (
            SegmentStep(0, (TokenRange(3, 0, 5), TokenRange(1, 7, 8))),
            SegmentStep(1, (TokenRange(1, 2, 8), TokenRange(3, 0, 5)), (1, 4)),
        ),
        (5, 6, 7, 8, 9, 10),
        (TokenRange(1, 7, 8),),
        ((3, 0, 17), (3, 1, 4)),
    ),
    SchedulerOutput((SegmentStep(2, (TokenRange(0, 0, 1),)),), (), (), ()),
]


@pytest.mark.parametrize("scheduler_output", PLANS)
def test_a_plan_comes_back_as_it_was(scheduler_output: SchedulerOutput) -> None:
    """Its types too: ranks compare spans, and a list is not equal to a tuple."""
    assert decode_scheduler_output(encode_scheduler_output(scheduler_output)) == scheduler_output


def test_plans_of_a_scheduler_come_back_as_they_were() -> None:
    scheduler = make_scheduler(num_blocks=14, max_num_batched_tokens=9)
    for index, strategy in enumerate(("exact", "full", "self-speculative", "propagate")):
        draft = SelfSpeculation(1, 2) if strategy == "self-speculative" else None
        scheduler.add(make_sequence(f"r{index}", 4, strategy=strategy, draft=draft))
    scheduler_outputs = finish(scheduler, leaving=[0, 3])
    for scheduler_output in scheduler_outputs:
        assert (
            decode_scheduler_output(encode_scheduler_output(scheduler_output)) == scheduler_output
        )
    assert {len(scheduler_output.steps) for scheduler_output in scheduler_outputs} >= {1, 2}
    assert any(
        step.frozen for scheduler_output in scheduler_outputs for step in scheduler_output.steps
    )


def test_a_pass_and_its_answers_come_back_as_they_were() -> None:
    sampling = SamplingParams(0.7, 5, 0.9, 2**40, 0.1, 1.2)
    frontier = Frontier(1, 4, 2, (0.5, None, 0.0), True, False, "margin", sampling, (3, 9))
    scheduler_output = PipelineSchedulerOutput(
        7, (TokenRange(1, 2, 5),), (3, 9, 9), (frontier,), ((1, 0, 4),)
    )
    for is_late in (False, True):
        passed = PassEnvelope.of(
            PassEnvelope([-1], encode_pass(scheduler_output)).message(is_late=is_late)
        )
        assert (passed.exited, passed.is_late) == ([-1], is_late)
        assert decode_pass(passed.encoded) == scheduler_output
    answers = [StageResult(0, 1, ExitResult(1, 4, True, 9, 0.25, -0.5))]
    assert decode_results(encode_results(7, answers)) == (7, answers)


def test_a_message_is_json() -> None:
    """It is read, never executed."""
    assert isinstance(json.loads(encode_scheduler_output(PLANS[0])), list)
    for message in (b"\x80\x04K\x01.", b"__import__('os')"):
        with pytest.raises(ValueError):  # noqa: PT011
            decode_scheduler_output(message)
