"""Test the analysis of recorded passes, and the rows and figures computed from it."""

import json
from dataclasses import replace

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.engine import Engine
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import ExitResult, Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.deferral import LatencyProfile
from ee_llm.inference.scheduling.output import SchedulerOutput, SegmentStep, TokenRange
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.unit.inference.models import random_tensors, random_tokens, tiny_config
from tools.bench.decode_costs import Costs
from tools.bench.decode_quality import Certificate
from tools.bench.decode_rows import (
    DEFERRED,
    EXACT,
    FULL,
    PEER,
    SELF_SPECULATIVE,
    Row,
    Sample,
    make_figures,
    make_rows,
    percentile,
)
from tools.bench.decode_setup import run
from tools.bench.decode_trace import Arrival, Pass, Trace, deferral_times, fill_share, steady
from tools.bench.decode_trace import decode as decode_traced
from tools.bench.report import Ratio

POLICY = make_exit_policy((1, 2), (0.3,))
GREEDY = SamplingParams(max_tokens=10)


def result(slot: int, position: int, exited: bool) -> ExitResult:
    return ExitResult(slot, position, exited, 7, 0.5, -1.0)


def step(number: int, steps, results=()) -> Pass:
    """A pass from second 10 n to 10 n + 8; steps: segment, then (slot, start, stop) per range."""
    made = tuple(
        SegmentStep(segment, tuple(TokenRange(*token_range) for token_range in ranges))
        for segment, *ranges in steps
    )
    heads = tuple(TokenRange(one.slot, one.position, one.position + 1) for one in results)
    return Pass(
        SchedulerOutput(made, (), heads, ()), tuple(results), 10.0 * number, 10.0 * number + 8
    )


def two_sequences() -> Trace:
    """Two prompts of 3 tokens, each with 3 new tokens; only sequence 0's first token declines."""
    passes = [
        step(0, [(0, (0, 0, 3), (1, 0, 3))], [result(0, 2, False), result(1, 2, True)]),
        step(1, [(0, (1, 3, 4))], [result(1, 3, True)]),
        step(2, [(1, (0, 0, 3), (1, 0, 4))], [result(0, 2, True)]),
        step(3, [(0, (0, 3, 4), (1, 4, 5))], [result(0, 3, True), result(1, 4, True)]),
        step(4, [(0, (0, 4, 5))], [result(0, 4, True)]),
    ]
    arrivals = [
        Arrival(8.1, "1", (1,), False),
        Arrival(18.1, "1", (1,), False),
        Arrival(28.1, "0", (2,), False),
        Arrival(38.1, "0", (1,), False),
        Arrival(38.2, "1", (1,), True),
        Arrival(48.1, "0", (1,), True),
    ]
    made = [generation(exits) for exits in ((2, 1, 1), (1, 1, 1))]
    return Trace(made, arrivals, passes, 0.0, 49.0)


def generation(exits: tuple[int, ...], policy=None, strategy="exact") -> RequestOutput:
    policy = policy or make_exit_policy((1,), (0.3,))
    tokens, floats = (7,) * len(exits), (0.5,) * len(exits)
    return RequestOutput(
        request_id="0",
        prompt_token_ids=(1, 2, 3),
        token_ids=tokens,
        exits=exits,
        confidences=floats,
        logprobs=floats,
        finish_reason="length",
        policy=policy,
        sampling_params=GREEDY,
        strategy=strategy,
        num_layers=4,
    )


def test_heads_gaps_and_first_tokens_are_computed_from_passes():
    trace = two_sequences()
    assert trace.heads_per_token == 7 / 6
    assert trace.first_token_seconds == pytest.approx([8.1, 28.1])
    assert trace.gaps == pytest.approx([10.0, 10.0, 20.1, 10.0])


def test_tokens_that_arrive_together_have_gaps_of_zero():
    arrivals = [Arrival(1.0, "a", (2, 2), False), Arrival(4.0, "a", (2, 2, 2), True)]
    assert Trace([], arrivals, [], 0.0, 5.0).gaps == [0.0, 3.0, 0.0, 0.0]


def test_the_steady_part_is_between_the_last_prompt_and_the_first_end():
    step = steady(two_sequences())
    # Both prompts are complete after pass 2. The first sequence ends with pass 3.
    assert (step.seconds, step.exits, step.share) == (10.0, (1, 1), 2 / 6)
    assert step.seconds_per_token == 5.0


def test_without_a_steady_part_the_whole_trace_counts():
    trace = two_sequences()
    short = replace(trace, passes=trace.passes[:2], arrivals=trace.arrivals[:4])
    ended = replace(short, arrivals=[replace(a, is_last=True) for a in short.arrivals])
    assert steady(ended).share == 1.0
    assert steady(ended).seconds == 49.0


def test_a_row_is_deferred_until_a_pass_runs_it_beyond_the_declined_exit():
    found = deferral_times(two_sequences().passes)
    assert found.steps == [1]  # one pass in between
    assert found.seconds == [12.0]  # from the end of pass 0 to the start of pass 2
    again = [
        step(0, [(0, (0, 2, 3))], [result(0, 2, False)]),
        step(1, [(1, (0, 2, 3))], [result(0, 2, False)]),
        step(2, [(0, (1, 2, 3)), (2, (0, 2, 3))], [result(0, 2, True)]),
    ]
    assert deferral_times(again).steps == [0, 0]


def test_fill_rows_are_those_whose_token_is_already_decided():
    # After the prompts: rows 2 and 2; 3; 2 (declined), 2 and 3 (both already exited); 3, 4; 4.
    assert fill_share(two_sequences().passes, num_prompt=3) == 2 / 9


def engine_of(config, tensors, **scheduler_config) -> Engine:
    return Engine(
        config, tensors, torch.float64, SchedulerConfig(**scheduler_config), deferral="auto"
    )


def test_recording_changes_no_output_and_misses_no_token():
    config = tiny_config()
    tensors = random_tensors(config)
    engine = engine_of(config, tensors, max_num_seqs=4)
    prompts = [tuple(random_tokens(6, seed).tolist()) for seed in range(3)]
    requests = [Request(str(n), prompt, POLICY, GREEDY) for n, prompt in enumerate(prompts)]
    trace = decode_traced(engine, requests)
    model = ReferenceModel(config, tensors, torch.float64)
    for made, prompt in zip(trace.generations, prompts, strict=True):
        expected = generate_reference(model, prompt, POLICY, GREEDY, "exact")
        assert (made.token_ids, made.exits) == (expected.token_ids, expected.exits)
    arrived = [exit for arrival in trace.arrivals for exit in arrival.exits]
    assert sorted(arrived) == sorted(exit for made in trace.generations for exit in made.exits)
    assert "run" not in vars(engine.runner)
    assert "apply" not in vars(engine.scheduler)
    # By counting: a token that exits after segment s is evaluated at all exits up to it.
    num_heads = sum((1, 2, 4).index(exit) + 1 for exit in arrived)
    assert trace.heads_per_token == num_heads / len(arrived)


def test_only_deferral_sides_defer_and_prompts_are_never_cached():
    config = tiny_config()
    engine = engine_of(config, random_tensors(config), max_num_seqs=2)
    deferral = engine.deferral
    prompts = [tuple(random_tokens(20, seed).tolist()) for seed in range(2)]
    for number in range(2):
        before = list(deferral._evaluated)
        made = run(engine, EXACT, POLICY, None, prompts, 4, f"{number}", None)
        assert deferral._evaluated == before
        first = made.trace.passes[0].scheduler_output
        assert len(first.tokens) == 40  # whole prompts, in the second round too
        assert engine.deferral is deferral
    run(engine, DEFERRED, POLICY, None, prompts, 4, "deferral", deferral)
    assert deferral._evaluated != before


def test_percentile_returns_a_sample():
    assert percentile([3.0, 1.0, 2.0, 4.0], 50) == 2.0
    assert percentile(list(map(float, range(1, 101))), 99) == 99.0
    assert percentile([5.0], 99) == 5.0


def even_trace(exits: tuple[int, ...], seconds: float, policy) -> Trace:
    """One sequence with a token after each pass of `seconds`. Pass 0 completes its prompt."""
    passes, arrivals = [], []
    for n, exit in enumerate(exits):
        scheduler_output = SchedulerOutput(
            (SegmentStep(1, (TokenRange(0, n and n + 2, n + 3),)),),
            (),
            (TokenRange(0, n + 2, n + 3),),
            (),
        )
        start, end = n * seconds, (n + 1) * seconds
        passes.append(Pass(scheduler_output, (result(0, n + 2, True),), start, end))
        arrivals.append(Arrival(end, "0", (exit,), n == len(exits) - 1))
    return Trace([generation(exits, policy)], arrivals, passes, 0.0, len(exits) * seconds)


def test_rows_compare_the_measured_speed_up_with_both_ideals():
    policy = make_exit_policy((1,), (0.3,))
    off = policy.without_exits()
    full, exact = even_trace((4, 4, 4), 6.0, off), even_trace((1, 1, 4), 4.0, policy)
    drafting = [replace(full.generations[0], num_drafted=4, num_accepted=3)]
    samples = {
        FULL: [sample(full)] * 2,
        EXACT: [sample(exact)] * 2,
        DEFERRED: [sample(exact)] * 2,
        SELF_SPECULATIVE: [sample(replace(full, generations=drafting))] * 2,
        PEER: [Sample(36.0, [(1, 2, 3)], [(7, 7, 7)])] * 2,
        "transformers, drafting": [Sample(27.0, [(1, 2, 3)], [(7, 7, 7)])] * 2,
        "transformers, drafting 4": [Sample(24.0, [(1, 2, 3)], [(7, 7, 7)])] * 2,
    }
    costs = Costs(*(profile(*seconds) for seconds in ((1.0, 4.0), (1.0, 5.0), (1.0, 1.0), (6.0,))))
    rows = {row.side: row for row in make_rows(1, samples, costs, num_layers=4)}
    assert rows[FULL].over_transformers.value == 2.0
    assert rows[FULL].tokens_per_s.value == pytest.approx(1 / 6)
    assert rows[SELF_SPECULATIVE].over_assisted.value == pytest.approx(24 / 18)
    assert rows[EXACT].over_full.value == rows[EXACT].steady.value == 1.5
    # One of the two steady tokens exits early. A full pass costs 6, the two tokens 2 and 7.
    assert rows[EXACT].ideal == pytest.approx(6 / 4.5)
    assert rows[EXACT].efficiency.value == pytest.approx(1.5 * 4.5 / 6)
    assert rows[EXACT].regime_ideal == pytest.approx(6 / (2 + 0.5 * 5))
    assert rows[DEFERRED].regime_efficiency.value == pytest.approx(1.5 * 4.5 / 6)
    assert rows[EXACT].regime_passes == (1,)
    assert rows[EXACT].mean_depth == 2.0
    assert rows[EXACT].ttft_ms == 4000.0
    assert rows[EXACT].gap_p50_ms == rows[EXACT].gap_p99_ms == 4000.0
    assert rows[PEER].mean_depth is None
    assert (rows[SELF_SPECULATIVE].drafts_kept, rows[EXACT].drafts_kept) == (0.75, None)
    # With two sequences, k = 1 gives 6 / (2 + 3/4 * 5), and waiting for both is better.
    pair = {row.side: row for row in make_rows(2, samples, costs, num_layers=4)}
    assert (pair[EXACT].regime_ideal, pair[EXACT].regime_passes) == (pytest.approx(6 / 5.75), (1,))
    assert (pair[DEFERRED].regime_ideal, pair[DEFERRED].regime_passes) == (
        pytest.approx(1.16, abs=0.01),
        (8,),
    )
    record = rows[EXACT].record()
    assert (record["over_full"], record["over_full_low"], record["over_full_high"]) == (1.5,) * 3
    assert json.loads(json.dumps(record))["side"] == EXACT


def profile(*seconds: float) -> LatencyProfile:
    """Return times that do not depend on the number of rows."""
    return LatencyProfile((1,), tuple((time,) for time in seconds))


def sample(trace: Trace) -> Sample:
    tokens = [generation.token_ids for generation in trace.generations]
    return Sample(trace.seconds, [(1, 2, 3)], tokens, trace)


def test_each_figure_comes_from_its_row():
    def ratio(value: float) -> Ratio:
        return Ratio(value, value, value)

    rows = [
        Row(1, FULL, ratio(1), over_transformers=ratio(2.0)),
        Row(16, FULL, ratio(1), over_transformers=ratio(3.0)),
        Row(1, EXACT, ratio(1), efficiency=ratio(0.9), over_full=ratio(0.1)),
        Row(1, SELF_SPECULATIVE, ratio(1), over_assisted=ratio(1.4)),
    ]
    rows += [
        Row(
            batch,
            DEFERRED,
            ratio(1),
            over_full=ratio(1 + batch / 100),
            steady=ratio(2 + batch),
            regime_efficiency=ratio(batch / 50),
        )
        for batch in (4, 8, 16, 32)
    ]
    certificates = [Certificate(100, 3, 0.0, 0.0, 4, 4), Certificate(300, 1, 0.0, 0.0, 12, 10)]
    assert make_figures(rows, certificates) == {
        "full_vs_hf_b1": 2.0,
        "full_vs_hf_b16": 3.0,
        "exact_efficiency_b1": 0.9,
        "exact_regime_efficiency_b8": 8 / 50,
        "exact_regime_efficiency_b16": 16 / 50,
        "exact_regime_efficiency_b32": 32 / 50,
        "exact_vs_full_min": 1.04,
        "exact_vs_full_steady_min": 6,
        "verify_vs_hf_assisted_b1": 1.4,
        "certificate_pass_rate": 14 / 16,
        "divergence_rate": 4 / 400,
    }
