"""Test that the output does not depend on memory, batch composition or chunk sizes."""

from dataclasses import replace

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.deferral import LatencyProfile
from ee_llm.inference.verification.certificate import verify_trace
from tests.unit.inference.engines import (
    DRAWN,
    assert_idle,
    assert_same,
    make_engine,
    make_request,
    one_of_each,
    reference,
    serve,
    with_settings,
)
from tests.unit.inference.models import random_tensors, tiny_config
from tests.unit.inference.peers import gpt2_of_transformers, llama_of_transformers, make_precise

# The largest error of logits that rounding explains. Logits of a random model are about 2.
EPSILON = {torch.float32: 1e-4, torch.bfloat16: 0.5}


def _letters(tokens: list[int]) -> str:
    """Return two characters per token, so that stop strings cross the edges of tokens."""
    return "".join(f"{token:02d}" for token in tokens)


@pytest.mark.parametrize("num_blocks", [9, 11, 14])
@pytest.mark.parametrize("sampling", [SamplingParams(), DRAWN])
def test_preempted_requests_restart_without_changing_the_output(
    num_blocks: int, sampling: SamplingParams
) -> None:
    """A single one of the eight requests may need eight blocks."""
    requests = [
        with_settings(request, f"{request.id}{index}", max_tokens=20)
        for index in range(2)
        for request in one_of_each(sampling=sampling)
    ]
    engine = make_engine(num_blocks=num_blocks)
    made, _ = serve(engine, requests)
    for request, generation in zip(requests, made, strict=True):
        assert_same(generation, reference(request))
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("max_num_batched_tokens", [1, 3, 64])
@pytest.mark.parametrize("max_pending", [4, 5, 16])
def test_chunked_prompts_give_the_same_tokens(
    max_pending: int, max_num_batched_tokens: int
) -> None:
    requests = [
        replace(request, prompt_token_ids=(*request.prompt_token_ids, *range(length)))
        for request, length in zip(one_of_each(max_tokens=6), (15, 2, 9, 13, 11, 6), strict=True)
    ]
    made, _ = serve(
        make_engine(max_pending=max_pending, max_num_batched_tokens=max_num_batched_tokens),
        requests,
    )
    for request, generation in zip(requests, made, strict=True):
        assert_same(generation, reference(request))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sampling", [SamplingParams(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("head", [("norm",), ("block", "mlp", "norm")], ids="-".join)
def test_exact_without_exits_equals_full_bit_for_bit(
    head: tuple[str, ...], sampling: SamplingParams, dtype: torch.dtype
) -> None:
    """Both run the same rows through the same layers, in three passes or in one."""
    config = tiny_config(head=head)
    lengths = ((5, 12), (1, 20), (9, 4), (16, 12), (3, 12), (12, 9))

    def made(strategy: str, **options: object) -> list:
        requests = [
            make_request(f"{n}", n, strategy, max_tokens=m, sampling=sampling, **options)
            for n, m in lengths
        ]
        return serve(make_engine(config, dtype, num_blocks=129), requests)[0]

    full = made("full")
    for thresholds in ((1.0, 1.0), (None, 1.0), (None, None)):
        exact = made("exact", thresholds=thresholds)
        for ours, theirs in zip(exact, full, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.exits == theirs.exits == (4,) * len(ours.token_ids)
            assert ours.confidences == theirs.confidences
            assert ours.logprobs == theirs.logprobs


@pytest.mark.parametrize("max_deferred_steps", [1, 3, 7])
def test_deferral_changes_no_token_and_respects_max_deferred_steps(
    max_deferred_steps: int,
) -> None:
    """With a single exit the bound is exact: the deeper segment runs when a row is due."""
    config = tiny_config(boundaries=(2,))
    engine = make_engine(config, max_deferred_steps=max_deferred_steps)
    engine.scheduler.deferral_targets = [1, 99]
    requests = [
        make_request(f"{n}", n, thresholds=(0.35,), boundaries=(2,), max_tokens=16)
        for n in range(2, 10)
    ]
    for request in requests:
        engine.add(request)
    made, waits = {}, [0]
    while engine.has_work:
        made |= {u.request_id: u.request_output for u in engine.step() if u.request_output}
        scheduler = engine.scheduler
        waits += [
            scheduler.step - one.waiting_since
            for one in scheduler.running
            if one.watermarks[0] and scheduler.due(one) > 0
        ]
    for request in requests:
        assert_same(made[request.id], reference(request, config))
    assert max(waits) == max_deferred_steps


def test_automatic_deferral_changes_no_token() -> None:
    """The test sets a profile that justifies deferral, because the model's own does not."""
    engine = make_engine(deferral="auto")
    assert engine.deferral is not None
    passes, heads = engine.deferral.passes, engine.deferral.heads
    assert passes.rows == heads.rows == (1, 2, 4, 8)
    assert all(time > 0.0 for times in passes.seconds for time in times)
    assert all(time >= 0.0 for times in heads.seconds for time in times)
    assert_idle(engine)
    engine.deferral.passes = LatencyProfile((1, 64), ((1.0, 1.0), (9.0, 9.0), (9.0, 9.0)))
    requests = [make_request(f"{n}", n, max_tokens=16) for n in range(2, 10)]
    targets: list[int] = []
    made = engine.generate(requests, lambda _: targets.extend(engine.scheduler.deferral_targets))
    for request, generation in zip(requests, made, strict=True):
        assert_same(generation, reference(request))
    assert max(targets) > 1
    assert engine.deferral.rates != [0.5, 0.5]


@pytest.mark.parametrize(("strategies", "rate"), [(("exact",) * 4, 0.0), (("exact", "full"), 0.5)])
def test_rows_without_an_exit_decision_count_as_declined(
    strategies: tuple[str, ...], rate: float
) -> None:
    """Deep passes must be as frequent as all requests together require."""
    engine = make_engine(tiny_config(boundaries=(2,)), deferral="auto")
    requests = [
        make_request(f"{n}", 5, strategy, (1e-9,), (2,), max_tokens=20)
        for n, strategy in enumerate(strategies)
    ]
    serve(engine, requests)
    assert engine.deferral is not None
    assert engine.deferral.rates[0] == pytest.approx(rate, abs=0.25)


def test_an_exit_that_is_off_counts_as_declined_by_all_rows() -> None:
    """An exit that is off must not halve the expected number of rows of deeper segments."""
    engine = make_engine(deferral="auto")
    requests = [make_request(f"{n}", 5, thresholds=(None, 1e-9), max_tokens=24) for n in (1, 2)]
    serve(engine, requests)
    assert engine.deferral is not None
    assert engine.deferral.rates[0] > 0.6 > 0.4 > engine.deferral.rates[1]


def _stopped(request: Request, stops: tuple[str, ...], num_tokens: int) -> None:
    """Assert that the stop strings end the request after `num_tokens` tokens."""
    whole = reference(request)
    engine = make_engine(detokenize=_letters)
    (made,), _ = serve(engine, [with_settings(request, stop=stops)])
    assert made.token_ids == whole.token_ids[:num_tokens]
    expected = "stop" if num_tokens < len(whole.token_ids) else whole.finish_reason
    assert made.finish_reason == expected


@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_a_sequence_ends_when_a_stop_string_is_complete(strategy: str) -> None:
    """It may begin and end inside tokens, and may be one of several stop strings."""
    request = make_request("s", 6, strategy, sampling=DRAWN)
    text = _letters(list(reference(request).token_ids))

    def first(*stops: str) -> int:
        """Return the number of tokens after which the text contains one of them."""
        return min((-(-(text.find(s) + len(s)) // 2) for s in stops if s in text), default=12)

    for stops in ((text[3:8],), (text[12:14], text[7:17]), (text[:21],), (text[5:7], "never")):
        assert first(*stops) < 12
        _stopped(request, stops, first(*stops))
    _stopped(request, ("never", "99"), 12)


def test_a_stop_string_in_the_prompt_does_not_end_the_output() -> None:
    request = make_request("s", 6, sampling=DRAWN)
    text = _letters(list(reference(request).token_ids))
    edge = _letters(list(request.prompt_token_ids)) + text
    assert edge[8:14] not in text
    _stopped(request, (edge[8:14],), 12)


def test_a_character_of_several_tokens_is_matched_when_it_is_complete() -> None:
    """A decoder shows an incomplete character as a replacement character."""
    request = make_request("s", 6, max_tokens=9, sampling=DRAWN)
    tokens = reference(request).token_ids
    pieces = dict(zip(tokens[3:6], "€".encode(), strict=True))
    assert len(pieces) == 3, "the test needs three different tokens"

    def decode(ids: list[int]) -> str:
        return bytes(pieces.get(id, 97) for id in ids).decode(errors="replace")

    (made,), _ = serve(make_engine(detokenize=decode), [with_settings(request, stop=("€",))])
    assert made.token_ids == tokens[:6]
    assert made.finish_reason == "stop"


def test_a_stop_string_matches_across_tokens_without_text() -> None:
    """Special tokens and tokens that the tokenizer does not know have no text."""
    request = make_request("s", 6, max_tokens=20, strategy="full", sampling=DRAWN)
    tokens = reference(request).token_ids
    first = next(token for token in tokens if tokens.count(token) == 1)
    start = tokens.index(first) + 9
    last = next(token for token in tokens[start:] if token not in tokens[:start])

    def decode(ids: list[int]) -> str:
        return "".join({first: "a", last: "b"}.get(id, "") for id in ids)

    (made,), _ = serve(make_engine(detokenize=decode), [with_settings(request, stop=("ab",))])
    assert made.finish_reason == "stop"
    assert made.token_ids == tokens[: tokens.index(last) + 1]


@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_stop_tokens_and_end_tokens_end_a_sequence(strategy: str) -> None:
    request = make_request("s", 6, strategy, sampling=DRAWN)
    whole = reference(request)
    late = next(token for token in whole.token_ids[4:] if token not in whole.token_ids[:4])
    for options, reason in (
        ({"eos_token_ids": (late, 39)}, "eos"),
        ({"stop_token_ids": (39, late)}, "stop"),
    ):
        shorter = (
            replace(request, **options)
            if "eos_token_ids" in options
            else with_settings(request, **options)
        )
        (made,), _ = serve(make_engine(), [shorter])
        assert_same(made, reference(shorter))
        assert made.token_ids[-1] == late
        assert made.finish_reason == reason


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_full_equals_the_output_of_transformers(family: str) -> None:
    """Both decode greedily in float64. The top two tokens of the random model differ clearly."""
    config = tiny_config(family, num_kv_heads=4 if family == "gpt" else 2)
    tensors = random_tensors(config)
    if family == "llama":
        theirs = llama_of_transformers(config, tensors)
        make_precise(theirs)
    else:
        theirs = gpt2_of_transformers(config, tensors)
    requests = [make_request(f"{n}", n, "full", max_tokens=31 - n) for n in (1, 4, 7, 12, 20)]
    made, _ = serve(make_engine(config), requests)
    for request, generation in zip(requests, made, strict=True):
        prompt = torch.tensor([request.prompt_token_ids])
        continued = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.sampling_params.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert continued[0, len(request.prompt_token_ids) :].tolist() == list(generation.token_ids)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_rounding_explains_every_divergence_in_lower_precision(
    family: str, dtype: torch.dtype
) -> None:
    """The certificate uses the same rounded weights in float64."""
    config = tiny_config(family)
    tensors = random_tensors(config, dtype=dtype)
    requests = [
        replace(request, id=f"{request.id}{index}")
        for index, sampling in enumerate(
            (SamplingParams(), DRAWN, SamplingParams(temperature=1.0, min_p=0.05, seed=2))
        )
        for request in one_of_each(sampling=sampling, max_tokens=20)
    ]
    made, _ = serve(make_engine(config, dtype, tensors=tensors, num_blocks=33), requests)
    model = ReferenceModel(config, tensors, torch.float64)
    for generation in made:
        for divergence in verify_trace(model, generation):
            assert divergence.margin < EPSILON[dtype], (generation.strategy, divergence)
