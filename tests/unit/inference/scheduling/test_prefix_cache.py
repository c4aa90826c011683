"""Cached prefixes save work and do not change the output."""

from dataclasses import replace

import pytest

from ee_llm.inference.request import Request
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.engines import (
    DRAWN,
    assert_idle,
    assert_same,
    make_engine,
    make_request,
    reference,
    serve,
)
from tests.unit.inference.models import random_tokens

PROMPT = tuple(random_tokens(15, seed=2).tolist())  # three full blocks of four and a partial one


def _request(id: str, **options: object) -> Request:
    return make_request(id, **({"prompt": PROMPT, "max_tokens": 9} | options))


def _second(first: Request, second: Request) -> Sequence:
    """Serve both requests, one after the other, and return the second one's sequence."""
    engine = make_engine()
    for request in (first, second):
        (output,), (sequence,) = serve(engine, [request])
        assert_same(output, reference(request))
    return sequence


@pytest.mark.parametrize("sampling", [None, DRAWN])
@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_a_repeated_prompt_starts_after_the_cached_blocks(strategy: str, sampling) -> None:
    options = {"sampling": sampling} if sampling else {}
    first = _request("a", strategy=strategy, **options)
    assert _second(first, replace(first, id="b")).num_cached == 12


def test_strategies_that_compute_every_row_share_prefixes() -> None:
    others = (
        {"strategy": "full"},
        {"strategy": "self-speculative", "draft": SelfSpeculation(2, 4)},
    )
    for other in others:
        assert _second(_request("a"), _request("b", **other)).num_cached == 12
        assert _second(_request("a", **other), _request("b")).num_cached == 12


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "another"},
        {"thresholds": (0.35, 0.36)},
        {"strategy": "propagate"},
        {"prompt": (39 - PROMPT[0], *PROMPT[1:])},
    ],
    ids=str,
)
def test_nothing_is_shared_across_tenants_policies_and_prompts(other: dict) -> None:
    assert _second(_request("a"), _request("b", **other)).num_cached == 0
    assert _second(_request("a", **other), _request("b")).num_cached == 0


@pytest.mark.parametrize(("strategy", "num_cached"), [("exact", 20), ("propagate", 12)])
def test_an_output_is_shared_unless_its_rows_were_frozen(strategy: str, num_cached: int) -> None:
    """`propagate` freezes the rows of new tokens but not those of a prompt.

    The longer prompt ends with the first output, so all of its 6 blocks could be in the cache.
    """
    first = _request("a", strategy=strategy)
    output = reference(first)
    assert len(set(output.exits)) > 1, "the test needs rows that exit early"
    second = _request("b", strategy=strategy, prompt=(*PROMPT, *output.token_ids))
    found = _second(first, second).num_cached
    assert 12 < found <= num_cached if strategy == "exact" else found == num_cached


def test_a_prefix_is_shared_while_its_first_owner_still_decodes() -> None:
    engine = make_engine()
    first, second = _request("a", max_tokens=12), _request("b", sampling=DRAWN)
    engine.add(first)
    outputs = {}
    for _ in range(8):
        engine.step()
    engine.add(second)
    sequence = engine._sequences["b"]
    engine.step()
    assert sequence.num_cached == 12
    assert engine._sequences["a"].blocks[:3] == sequence.blocks[:3]
    assert engine.abort("a") is not None, "the second one keeps its blocks"
    while engine.has_work:
        outputs |= {
            step.request_id: step.request_output for step in engine.step() if step.request_output
        }
        engine.scheduler.check_integrity()
    assert_same(outputs["b"], reference(second))
    assert_idle(engine)


def test_an_evicted_prefix_is_computed_again() -> None:
    """New sequences overwrite the least recently used blocks, from the end of the prefix."""
    engine = make_engine(num_blocks=9)
    prompts = [tuple(random_tokens(15, seed=seed).tolist()) for seed in (2, 3, 4)]
    num_cached = []
    for index, prompt in enumerate([*prompts, prompts[0], prompts[0]]):
        request = _request(f"r{index}", prompt=prompt, max_tokens=2)
        (output,), (sequence,) = serve(engine, [request])
        assert_same(output, reference(request))
        num_cached.append(sequence.num_cached)
    assert num_cached == [0, 0, 0, 0, 12]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    engine, request = make_engine(), _request("a")
    engine.add(request)
    sequence = engine._sequences["a"]
    while len(sequence.exits) < 5:
        engine.step()
    engine.scheduler.preempt(sequence)
    engine.step()
    assert sequence.num_cached >= 12
    outputs = [step.request_output for _ in range(60) for step in engine.step()]
    assert_same(outputs[-1], reference(request))
    assert_idle(engine)
