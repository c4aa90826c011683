"""Exit decisions: which rows exit with which token, independently of the other rows."""

import math

import pytest
import torch
from torch import Tensor

from ee_llm.inference.exits.confidence import OF_LOGITS
from ee_llm.inference.exits.decision import (
    ExitQuery,
    can_decide_from_summaries,
    decide_exits,
    decide_from_summaries,
    make_query,
    summarize,
)
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import sample
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import make_sequence

GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.2, seed=9)


def _logits(num_rows: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return 2.0 * torch.randn(num_rows, 40, generator=generator, dtype=torch.float64).to(dtype)


def _query(row: int, threshold: float = 0.0, **options: object) -> ExitQuery:
    given = {"measure": "max_probability", "sampling_params": GREEDY} | options
    return ExitQuery(slot=row + 10, position=row * 7, threshold=threshold, **given)


def test_no_queries_give_no_results() -> None:
    assert decide_exits(torch.empty(0, 40), []) == []


@pytest.mark.parametrize("measure", OF_LOGITS)
def test_a_row_exits_when_its_confidence_reaches_the_threshold(measure: str) -> None:
    """Equality suffices, as in `ExitPolicy.exits`."""
    logits = _logits(3)
    values = OF_LOGITS[measure](logits).tolist()
    thresholds = [values[0], math.nextafter(values[1], 2.0), values[2] - 0.01]
    queries = [_query(row, t, measure=measure) for row, t in enumerate(thresholds)]
    results = decide_exits(logits, queries)
    assert [result.exited for result in results] == [True, False, True]
    assert [result.confidence for result in results] == values
    assert [(result.slot, result.position) for result in results] == [
        (10, 0),
        (11, 7),
        (12, 14),
    ]


def test_a_row_that_declines_has_no_token() -> None:
    results = decide_exits(_logits(2), [_query(0, 1.0), _query(1)])
    assert (results[0].token, results[0].logprob) == (-1, 0.0)
    assert results[1].token == int(_logits(2)[1].argmax())
    (single,) = decide_exits(_logits(1), [_query(0, 1.0)])
    assert (single.exited, single.token) == (False, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        DRAWN,
        SamplingParams(temperature=0.8, top_k=9, seed=3),
        SamplingParams(repetition_penalty=1.5),
    ],
)
def test_tokens_are_those_of_the_sampler(sampling: SamplingParams, dtype: torch.dtype) -> None:
    """The log probability refers to the exit's distribution before sampling parameters apply."""
    logits = _logits(dtype=dtype)
    histories = [tuple(range(row * 7 + 1)) for row in range(6)]
    queries = [
        _query(row, sampling_params=sampling, history=history)
        for row, history in enumerate(histories)
    ]
    for row, result in enumerate(decide_exits(logits, queries)):
        assert result.token == sample(logits[row], sampling, row * 7, histories[row])
        expected = logits[row].double().log_softmax(dim=0)[result.token]
        assert result.logprob == pytest.approx(float(expected), abs=1e-5)


def test_a_result_is_bit_identical_for_any_other_rows() -> None:
    logits = _logits(dtype=torch.float32)
    kinds = [
        {"sampling_params": GREEDY, "measure": "entropy"},
        {"sampling_params": DRAWN, "threshold": 0.2},
        {
            "sampling_params": SamplingParams(temperature=0.7, top_k=5, top_p=0.9, seed=11),
            "measure": "margin",
        },
        {"sampling_params": GREEDY, "threshold": 0.99},
        {"sampling_params": SamplingParams(repetition_penalty=2.0), "history": tuple(range(29))},
        {
            "sampling_params": SamplingParams(temperature=1.0, min_p=0.1),
            "measure": "entropy",
            "threshold": 0.1,
        },
    ]
    queries = [_query(row, **kind) for row, kind in enumerate(kinds)]
    together = decide_exits(logits, queries)
    assert {result.exited for result in together} == {True, False}
    for row, result in enumerate(together):
        assert decide_exits(logits[row : row + 1], [queries[row]]) == [result]
    order = [3, 0, 5, 1, 4, 2]
    shuffled = decide_exits(logits[order], [queries[row] for row in order])
    assert shuffled == [together[row] for row in order]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_logits_that_are_not_finite_changes_no_other_row(bad: float) -> None:
    logits = _logits(3, torch.float32)
    queries = [_query(0), _query(1, threshold=1.0), _query(2)]
    expected = decide_exits(logits, queries)
    logits[1, 3] = bad
    first, bad_row, last = decide_exits(logits, queries)
    assert [first, last] == [expected[0], expected[2]]
    assert (bad_row.exited, bad_row.is_finite, bad_row.token) == (True, False, -1)


def test_large_logits_are_finite_even_if_their_sum_is_not() -> None:
    logits = torch.full((1, 8), 3e38)
    assert decide_exits(logits, [_query(0)])[0].is_finite


def test_a_query_has_the_threshold_of_its_boundary() -> None:
    one = make_sequence(num_prompt=4, thresholds=(0.25, 0.75))
    one.slot = 3
    first = make_query(one, 3, 0)
    assert (first.slot, first.position, first.threshold) == (3, 3, 0.25)
    assert make_query(one, 3, 1).threshold == 0.75
    assert make_query(one, 3, 2).threshold == 0.0, "the final exit always exits"
    assert (first.measure, first.sampling_params) == (
        "max_probability",
        one.request.sampling_params,
    )


@pytest.mark.parametrize(("threshold", "expected"), [(None, 0.0), (0.6, 0.6)])
def test_the_query_of_a_drafting_exit_has_the_draft_threshold(
    threshold: float | None, expected: float
) -> None:
    draft = SelfSpeculation(2, 3, threshold)
    one = make_sequence(strategy="self-speculative", draft=draft, thresholds=(0.1, 0.1))
    assert make_query(one, 2, 1).threshold == expected
    assert make_query(one, 2, 2).threshold == 0.0


def test_queries_have_a_history_only_with_a_repetition_penalty() -> None:
    assert make_query(make_sequence(num_prompt=6), 4, 0).history == ()
    penalised = make_sequence(num_prompt=6, sampling=SamplingParams(repetition_penalty=1.1))
    assert make_query(penalised, 4, 0).history == penalised.request.prompt_token_ids[:5]


def _summaries(logits: Tensor, num_shards: int) -> Tensor:
    parts = logits.chunk(num_shards, dim=-1)
    first = [index * 40 // num_shards for index in range(num_shards)]
    return torch.cat([summarize(*part) for part in zip(parts, first, strict=True)], dim=-1)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_summaries_of_shards_give_the_results_of_the_logits(
    dtype: torch.dtype, error: float, num_shards: int
) -> None:
    logits = _logits(dtype=dtype)
    logits[4] = -200.0  # only ties have any probability
    logits[4, 13::10] = 200.0
    values = OF_LOGITS["max_probability"](logits).tolist()
    thresholds = [value + 0.01 * (-1) ** row for row, value in enumerate(values)]
    queries = [_query(row, threshold) for row, threshold in enumerate(thresholds)]
    summaries = _summaries(logits, num_shards)
    assert summaries.shape == (6, 3 * num_shards)
    found, expected = decide_from_summaries(summaries, queries), decide_exits(logits, queries)
    assert [one.exited for one in found] == [False, True] * 3
    for one, other in zip(found, expected, strict=True):
        assert (one.slot, one.position, one.token) == (other.slot, other.position, other.token)
        assert one.exited == other.exited
        assert one.confidence == pytest.approx(other.confidence, abs=error)
        assert one.logprob == pytest.approx(other.logprob, abs=10 * error)


def test_of_equal_logits_in_different_shards_the_lowest_id_wins() -> None:
    logits = torch.zeros(2, 40)
    logits[0, [17, 23, 38]] = 4.0
    logits[1, [25, 26]] = 4.0
    results = decide_from_summaries(_summaries(logits, 4), [_query(0), _query(1)])
    assert [result.token for result in results] == [17, 25]


def test_empty_summaries_give_no_results() -> None:
    assert summarize(torch.empty(0, 20), 20).shape == (0, 3)
    assert decide_from_summaries(torch.empty(0, 6), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_summary_that_is_not_finite_changes_no_other_row(bad: float) -> None:
    logits = _logits(2, torch.float32)
    queries = [_query(0), _query(1, threshold=1.0)]
    expected = decide_from_summaries(_summaries(logits, 2), queries)
    logits[1, 33] = bad
    first, bad_row = decide_from_summaries(_summaries(logits, 2), queries)
    assert first == expected[0]
    assert (bad_row.exited, bad_row.is_finite, bad_row.token) == (True, False, -1)


def test_summaries_suffice_only_for_greedy_tokens_and_max_probability() -> None:
    plain = _query(0)
    assert can_decide_from_summaries([])
    assert can_decide_from_summaries([plain, _query(1, 0.5)])
    for other in (
        {"measure": "entropy"},
        {"sampling_params": DRAWN},
        {"sampling_params": SamplingParams(repetition_penalty=1.1)},
    ):
        assert not can_decide_from_summaries([plain, _query(1, **other)])
