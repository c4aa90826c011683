"""Passes and results survive encoding: workers decode exactly what the leader encoded."""

import json

import pytest

from ee_llm.inference.decoding.settings import DoLa
from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.output import SchedulerOutput, SegmentStep, TokenRange
from ee_llm.inference.scheduling.pipeline_scheduler import (
    Frontier,
    PipelineSchedulerOutput,
    StageResult,
)
from ee_llm.inference.scheduling.wire import (
    PassEnvelope,
    decode_pass,
    decode_results,
    decode_scheduler_output,
    encode_pass,
    encode_results,
    encode_scheduler_output,
)
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import finish, make_scheduler, make_sequence

OUTPUTS = [
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


@pytest.mark.parametrize("scheduler_output", OUTPUTS)
def test_scheduler_output_round_trips(scheduler_output: SchedulerOutput) -> None:
    """Types survive too: ranks compare ranges, and a list does not equal a tuple."""
    assert decode_scheduler_output(encode_scheduler_output(scheduler_output)) == scheduler_output


def test_outputs_of_a_real_scheduler_round_trip() -> None:
    scheduler = make_scheduler(num_blocks=14, max_num_batched_tokens=9)
    for index, strategy in enumerate(("exact", "full", "self-speculative", "propagate")):
        draft = SelfSpeculation(1, 2) if strategy == "self-speculative" else None
        scheduler.add(make_sequence(f"r{index}", 4, strategy=strategy, draft=draft))
    contrast = DoLa(layers=(0, 3), head="raw")
    scheduler.add(make_sequence("r4", 4, strategy="dola", contrast=contrast))
    scheduler_outputs = finish(scheduler, exiting=[0, 3])
    queries = {query for output in scheduler_outputs for query in output.early_queries}
    assert {(query.boundaries, query.head) for query in queries} == {((0, 3), "raw")}
    assert {query.position for query in queries} == set(range(3, 11))
    for scheduler_output in scheduler_outputs:
        assert (
            decode_scheduler_output(encode_scheduler_output(scheduler_output)) == scheduler_output
        )
    assert {len(scheduler_output.steps) for scheduler_output in scheduler_outputs} >= {1, 2}
    assert any(
        step.frozen for scheduler_output in scheduler_outputs for step in scheduler_output.steps
    )


def test_pipeline_pass_and_its_results_round_trip() -> None:
    params = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, seed=2**40, min_p=0.1, repetition_penalty=1.2
    )
    frontier = Frontier(1, 4, 2, (0.5, None, 0.0), True, False, "margin", params, (3, 9))
    scheduler_output = PipelineSchedulerOutput(
        7, (TokenRange(1, 2, 5),), (3, 9, 9), (frontier,), ((1, 0, 4),)
    )
    for is_late in (False, True):
        passed = PassEnvelope.of(
            PassEnvelope(encode_pass(scheduler_output), [-1], [(3, 5)]).message(is_late=is_late)
        )
        assert (passed.exited, passed.is_late) == ([-1], is_late)
        assert decode_pass(passed.encoded) == scheduler_output
    results = [StageResult(0, 1, ExitResult(1, 4, True, 9, 0.25, -0.5))]
    assert decode_results(encode_results(7, results)) == (7, results)


def test_messages_are_json_and_never_executed() -> None:
    assert isinstance(json.loads(encode_scheduler_output(OUTPUTS[0])), list)
    for message in (b"\x80\x04K\x01.", b"__import__('os')"):
        with pytest.raises(ValueError):  # noqa: PT011
            decode_scheduler_output(message)
