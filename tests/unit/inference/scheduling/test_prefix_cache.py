"""Prefixes in the cache: what a request finds there saves work, and changes nothing."""

from dataclasses import replace

import pytest

from ee_llm.inference.request import Request, Sequence
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

PROMPT = tuple(random_tokens(15, seed=2).tolist())  # three whole blocks of four and a part


def _request(id: str, **options: object) -> Request:
    return make_request(id, **({"prompt": PROMPT, "max_new_tokens": 9} | options))


def _second(first: Request, second: Request) -> Sequence:
    """Return the second request's sequence after both were served, one after the other."""
    engine = make_engine()
    for request in (first, second):
        (made,), (sequence,) = serve(engine, [request])
        assert_same(made, reference(request))
    return sequence


@pytest.mark.parametrize("sampling", [None, DRAWN])
@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_the_same_prompt_again_starts_behind_the_cached_blocks(strategy: str, sampling) -> None:
    options = {"sampling": sampling} if sampling else {}
    first = _request("a", strategy=strategy, **options)
    assert _second(first, replace(first, id="b")).num_cached == 12


def test_the_strategies_that_compute_every_row_share() -> None:
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
def test_a_continued_answer_is_shared_unless_its_rows_were_frozen(
    strategy: str, num_cached: int
) -> None:
    """Under `propagate` the rows of new tokens are frozen, as those of a prompt are not.

    The longer prompt ends with the answer, so that the cache could hold all of its 6 blocks.
    """
    first = _request("a", strategy=strategy)
    answer = reference(first)
    assert len(set(answer.exits)) > 1, "the test needs rows that leave early"
    second = _request("b", strategy=strategy, prompt=(*PROMPT, *answer.tokens))
    found = _second(first, second).num_cached
    assert 12 < found <= num_cached if strategy == "exact" else found == num_cached


def test_a_prefix_is_shared_while_its_first_owner_still_decodes() -> None:
    engine = make_engine()
    first, second = _request("a", max_new_tokens=12), _request("b", sampling=DRAWN)
    engine.add(first)
    made = {}
    for _ in range(8):
        engine.step()
    engine.add(second)
    sequence = engine._sequences["b"]
    engine.step()
    assert sequence.num_cached == 12
    assert engine._sequences["a"].blocks[:3] == sequence.blocks[:3]
    assert engine.abort("a") is not None, "whose blocks the second one keeps"
    while engine.has_work:
        made |= {u.id: u.generation for u in engine.step() if u.generation}
        engine.scheduler.check_integrity()
    assert_same(made["b"], reference(second))
    assert_idle(engine)


def test_a_prefix_that_had_to_go_is_computed_again() -> None:
    """The least recently used blocks are overwritten by what came since, its end first."""
    engine = make_engine(num_blocks=9)
    prompts = [tuple(random_tokens(15, seed=seed).tolist()) for seed in (2, 3, 4)]
    num_cached = []
    for index, prompt in enumerate([*prompts, prompts[0], prompts[0]]):
        request = _request(f"r{index}", prompt=prompt, max_new_tokens=2)
        (made,), (sequence,) = serve(engine, [request])
        assert_same(made, reference(request))
        num_cached.append(sequence.num_cached)
    assert num_cached == [0, 0, 0, 0, 12]


def test_who_starts_anew_finds_its_own_blocks_again() -> None:
    engine, request = make_engine(), _request("a")
    engine.add(request)
    sequence = engine._sequences["a"]
    while len(sequence.exits) < 5:
        engine.step()
    engine.scheduler.preempt(sequence)
    engine.step()
    assert sequence.num_cached >= 12
    made = [output.generation for _ in range(60) for output in engine.step()]
    assert_same(made[-1], reference(request))
    assert_idle(engine)
