"""Test the engine: refused requests, freed resources, streams, aborts and failures."""

import math
from collections.abc import Callable

import pytest
import torch

from ee_llm.errors import RunError
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.outputs import RequestOutput, StepOutput
from ee_llm.inference.request import Request
from ee_llm.inference.scheduling.output import SchedulerOutput
from ee_llm.inference.strategies import STRATEGIES, SelfSpeculation
from tests.unit.inference.engines import (
    DRAWN,
    assert_idle,
    assert_same,
    make_engine,
    make_request,
    one_of_each,
    reference,
    serve,
)
from tests.unit.inference.models import random_tensors, tiny_config
from tests.unit.inference.poison import poisoned_traffic

OUT_OF_RANGE = (math.nan, 0.0, -0.1, 1.01)


def _self_speculative(
    boundary: int = 1, length: int = 3, threshold: float | None = None
) -> Request:
    return make_request(
        "bad", strategy="self-speculative", draft=SelfSpeculation(boundary, length, threshold)
    )


BAD: dict[str, tuple[Callable[[], Request], str]] = {
    "a prompt longer than the context": (
        lambda: make_request("bad", prompt=[1] * 33),
        r"33 tokens.*model\.max_seq_length = 32",
    ),
    "an empty prompt": (lambda: make_request("bad", prompt=[]), "prompt is empty"),
    "a draft at a boundary without an exit": (
        lambda: _self_speculative(3),
        r"draft_exit = 3 .*\[1, 2\]",
    ),
    "a draft at the final exit": (lambda: _self_speculative(4), "draft_exit = 4"),
    "a policy for other exits": (
        lambda: make_request("bad", boundaries=(1, 3)),
        r"\[1, 3\].*\[1, 2\]",
    ),
    "an empty draft": (lambda: _self_speculative(length=0), "draft_length = 0"),
    "a draft longer than a ring": (
        lambda: _self_speculative(length=16),
        "draft_length = 16 .*max_pending = 16",
    ),
    "more tokens than the cache": (
        lambda: make_request("bad", 20, max_tokens=12),
        r"'bad' .*31 positions.* 8 blocks.* 7",
    ),
    "an id in use": (lambda: make_request("good"), "id 'good' is in use"),
    "a fractional draft length": (lambda: _self_speculative(length=1.5), "draft_length = 1.5"),
    "a fractional token id": (
        lambda: make_request("bad", prompt=[1, 1.5]),
        "Token id 1.5",
    ),
    "a fractional max_tokens": (
        lambda: make_request("bad", max_tokens=2.5),
        "max_tokens = 2.5",
    ),
    "max_tokens that is not a number": (
        lambda: make_request("bad", max_tokens=math.nan),
        "max_tokens = nan",
    ),
    "a negative token": (
        lambda: make_request("bad", prompt=[1, -1]),
        r"Token id -1 .*model\.vocab_size = 40",
    ),
    "a token beyond the vocabulary": (
        lambda: make_request("bad", prompt=[1, 40]),
        r"Token id 40 .*model\.vocab_size = 40",
    ),
    "a stop token beyond the vocabulary": (
        lambda: make_request("bad", min_tokens=1, stop_token_ids=[3, 40]),
        r"Token id 40 in stop_token_ids .*model\.vocab_size = 40",
    ),
    "a stop token beyond every integer type": (
        lambda: make_request("bad", stop_token_ids=[10**30]),
        r"Token id 10{30} in stop_token_ids .*model\.vocab_size = 40",
    ),
    "a minimum length for which every token is banned": (
        lambda: make_request("bad", min_tokens=1, stop_token_ids=range(39), eos_token_ids=(39, 50)),
        r"min_tokens = 1 bans all 40 token ids",
    ),
    "a stop string without a tokenizer": (
        lambda: make_request("bad", stop=("x",)),
        r"stop = \['x'\] needs",
    ),
    "an empty stop string": (
        lambda: make_request("bad", stop=("x", "")),
        "stop = .*''",
    ),
    "an unknown strategy": (
        lambda: make_request("bad", strategy="exakt"),
        "strategy 'exakt' .*exact, full, self-speculative, propagate",
    ),
    "a draft with another strategy": (
        lambda: make_request("bad", draft=SelfSpeculation(1)),
        "strategy 'exact' .*speculation",
    ),
    "max_tokens of zero": (lambda: make_request("bad", max_tokens=0), "max_tokens = 0"),
}
for _value in OUT_OF_RANGE:
    BAD[f"a threshold of {_value}"] = (
        lambda value=_value: make_request("bad", thresholds=(value, None)),
        rf"thresholds: {_value} is not in \(0, 1\]",
    )
    BAD[f"a draft threshold of {_value}"] = (
        lambda value=_value: _self_speculative(threshold=value),
        rf"draft_threshold = {_value} is not in \(0, 1\]",
    )


def test_end_tokens_outside_the_vocabulary_are_never_generated() -> None:
    """The ids come from the tokenizer's files, and no logit belongs to them."""
    for strategy in ("exact", "self-speculative"):
        request = make_request("a", 5, strategy, min_tokens=4, eos_token_ids=(3, 40, 10**30))
        assert_same(serve(make_engine(), [request])[0][0], reference(request))
    every = make_request("a", min_tokens=4, stop_token_ids=range(39), eos_token_ids=(40, 41))
    (made,) = make_engine().generate([every])
    assert made.token_ids[:4] == (39,) * 4


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_request_is_refused_and_leaves_no_state(name: str) -> None:
    """The running request is not affected, and a later request can use the refused id."""
    build, message = BAD[name]
    engine = make_engine(num_blocks=8)
    good = make_request("good", max_tokens=9)
    engine.add(good)
    engine.step()
    with pytest.raises(ValueError, match=message):
        engine.add(build())
    assert list(engine._sequences) == ["good"]
    engine.scheduler.check_integrity()
    made = {}
    engine.add(make_request("bad", 4))
    while engine.has_work:
        made |= {output.request_id: output.request_output for output in engine.step()}
    assert_same(made["good"], reference(good))
    assert_same(made["bad"], reference(make_request("bad", 4)))
    assert_idle(engine)


def test_only_active_requests_can_be_aborted() -> None:
    engine, request = make_engine(), make_request("a")
    for _ in range(2):
        with pytest.raises(ValueError, match="id 'a' is finished"):
            engine.abort("a")
        serve(engine, [request])
    engine.add(request)
    assert engine.abort("a") is None
    with pytest.raises(ValueError, match="id .* is finished"):
        engine.abort("a")
    assert_idle(engine)


def _abort_after(engine: Engine, num_steps: int, victim: str) -> tuple[dict, RequestOutput | None]:
    """Abort a request after some steps; return all outputs and the partial one."""
    made = {}
    for request in one_of_each(max_tokens=5):
        engine.add(request)
    for _ in range(num_steps):
        made |= {u.request_id: u.request_output for u in engine.step() if u.request_output}
    partial = engine.abort(victim) if victim in engine._sequences else None
    engine.scheduler.check_integrity()
    while engine.has_work:
        made |= {u.request_id: u.request_output for u in engine.step() if u.request_output}
        engine.scheduler.check_integrity()
    assert_idle(engine)
    return made, partial


@pytest.mark.parametrize("num_blocks", [65, 9])
@pytest.mark.parametrize("victim", STRATEGIES)
def test_an_abort_at_any_step_frees_all_resources(victim: str, num_blocks: int) -> None:
    """One engine runs all cases, with many and with few blocks. Others are not affected."""
    engine = make_engine(num_blocks=num_blocks)
    expected = {request.id: reference(request) for request in one_of_each(max_tokens=5)}
    num_partial = num_steps = 0
    while True:
        made, partial = _abort_after(engine, num_steps, victim)
        for id, generation in made.items():
            assert_same(generation, expected[id])
        assert len(made) == len(STRATEGIES) - (victim not in made)
        if partial is not None:
            num_partial += 1
            count = len(partial.token_ids)
            assert partial.finish_reason == "abort"
            assert partial.token_ids == expected[victim].token_ids[:count]
            assert partial.exits == expected[victim].exits[:count]
        if victim in made:
            break
        num_steps += 1
    assert num_steps > 4
    assert num_partial > 1
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 9)


@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_damaged_weights_end_the_request_with_an_error(strategy: str) -> None:
    tensors = random_tensors(tiny_config())
    tensors["layers.4.mlp.linear_fc2.weight"][0, 0] = math.nan
    engine = make_engine(tensors=tensors)
    request = make_request("a", strategy=strategy, thresholds=(None, None))
    (made,) = engine.generate([request])
    assert (made.token_ids, made.finish_reason, made.mean_depth) == ((), "error", 0.0)
    assert made.error is not None
    assert "logits that are not finite" in made.error
    assert_idle(engine)


@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_a_full_context_ends_a_sequence(strategy: str) -> None:
    """The row of the last position decides one more token. The prompt may fill the context."""
    requests = [
        make_request(f"{strategy}{length}", length, strategy, max_tokens=9)
        for length in (31, 32, 30)
    ]
    made, _ = serve(make_engine(), requests)
    for request, generation in zip(requests, made, strict=True):
        assert_same(generation, reference(request))
    assert [len(generation.token_ids) for generation in made] == [2, 1, 3]
    assert {generation.finish_reason for generation in made} == {"context"}


def test_a_step_without_work_returns_no_output() -> None:
    assert make_engine().step() == []


@pytest.mark.parametrize("sampling", [None, DRAWN])
def test_a_stream_yields_the_generation_token_by_token(sampling) -> None:
    options = {"sampling": sampling} if sampling else {}
    engine = make_engine()
    other = make_request("other", 9, max_tokens=30, **options)
    engine.add(other)
    for request in one_of_each(**options):
        outputs = list(engine.stream(request))
        assert {output.request_id for output in outputs} == {request.id}
        assert [output.request_output is None for output in outputs[:-1]] == [True] * (
            len(outputs) - 1
        )
        (generation,) = [output.request_output for output in outputs if output.request_output]
        assert_same(generation, reference(request))
        token_outputs = [token_output for output in outputs for token_output in output.tokens]
        assert (
            tuple(token_output.token_id for token_output in token_outputs) == generation.token_ids
        )
        assert tuple(token_output.exit for token_output in token_outputs) == generation.exits
        assert (
            tuple(token_output.confidence for token_output in token_outputs)
            == generation.confidences
        )
        assert tuple(token_output.logprob for token_output in token_outputs) == generation.logprobs
    # The outputs of the other request from the streams' passes are still available.
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"other"}
    assert_same(outputs[-1].request_output, reference(other))
    assert sum(len(output.tokens) for output in outputs) == len(
        outputs[-1].request_output.token_ids
    )
    assert_idle(engine)


def test_a_stream_that_is_closed_early_is_aborted() -> None:
    engine, request = make_engine(), make_request("a")
    outputs = engine.stream(request)
    first = next(outputs)
    assert first.tokens[0].token_id == reference(request).token_ids[0]
    outputs.close()
    assert_idle(engine)
    *_, last = engine.stream(request)
    assert_same(last.request_output, reference(request))


def test_an_abort_discards_outputs_that_were_not_read() -> None:
    """The returned output has all tokens, and a request with the same id gets no old outputs."""
    engine = make_engine()
    engine.add(make_request("a", 4))
    engine.generate([make_request("b", 4, max_tokens=3)])
    partial = engine.abort("a")
    assert partial is not None
    assert len(partial.token_ids) > 0
    assert engine.step() == []
    assert_idle(engine)


@pytest.mark.parametrize("num_taken", [0, 1])
def test_a_dropped_stream_is_aborted(num_taken: int) -> None:
    engine = make_engine()
    stream = engine.stream(make_request("a"))
    for _ in range(num_taken):
        next(stream)
    del stream
    assert_idle(engine)
    assert_same(engine.generate([make_request("a")])[0], reference(make_request("a")))


@pytest.mark.parametrize("how", ["close", "drop", "leave"])
def test_an_unread_stream_is_aborted(how: str) -> None:
    engine = make_engine()
    stream = engine.stream(make_request("a"))
    if how == "close":
        stream.close()
        assert list(stream) == []
    elif how == "leave":
        with stream:
            pass
    del stream
    assert_idle(engine)


def test_a_stream_dropped_during_a_pass_is_aborted_after_it(monkeypatch) -> None:
    """Garbage collection can happen during a pass, which completes with the same sequences."""
    engine = make_engine()
    streams = [engine.stream(make_request("a"))]
    run = engine.runner.run

    def collect_garbage(scheduler_output):
        streams.clear()
        return run(scheduler_output)

    monkeypatch.setattr(engine.runner, "run", collect_garbage)
    engine.add(make_request("b", 6))
    found = []
    while engine.has_work:
        found += engine.step()
        engine.scheduler.check_integrity()
    assert {output.request_id for output in found} == {"b"}
    assert found[-1].request_output.token_ids == reference(make_request("b", 6)).token_ids
    assert_idle(engine)


def test_a_stream_dropped_while_outputs_are_returned_is_aborted(monkeypatch) -> None:
    engine = make_engine()
    streams = [engine.stream(make_request("a"))]
    output = engine._step_output

    def collect_garbage(sequence):
        streams.clear()
        return output(sequence)

    monkeypatch.setattr(engine, "_step_output", collect_garbage)
    engine.add(make_request("b", 6))
    found = []
    while engine.has_work:
        found += engine.step()
        engine.scheduler.check_integrity()
    assert {output.request_id for output in found} == {"b"}
    assert_idle(engine)


def test_generate_does_not_take_outputs_of_other_callers() -> None:
    engine = make_engine()
    engine.add(make_request("a", 4, max_tokens=2))
    engine.generate([make_request("b", 5, max_tokens=9)])
    assert engine.has_work
    outputs = engine.step()
    assert [output.request_id for output in outputs if output.request_output] == ["a"]
    assert_idle(engine)


def test_outputs_are_in_the_order_of_the_requests() -> None:
    lengths = (9, 2, 12, 1, 5)
    requests = [make_request(str(n), 6, max_tokens=n) for n in lengths]
    engine, outputs = make_engine(max_num_seqs=2), []
    made = engine.generate(requests, outputs.append)
    for request, generation in zip(requests, made, strict=True):
        assert_same(generation, reference(request))
    finished = [output.request_id for output in outputs if output.request_output]
    assert sorted(finished) == sorted(map(str, lengths))
    assert finished != [request.id for request in requests], "they end in another order"
    assert sum(len(output.tokens) for output in outputs) == sum(lengths)
    assert_idle(engine)
    assert engine.generate([]) == []
    (from_iterator,) = engine.generate(iter(requests[:1]))
    assert from_iterator.token_ids == made[0].token_ids


def test_one_invalid_request_refuses_the_whole_batch() -> None:
    engine = make_engine()
    engine.add(make_request("before"))
    for bad in (make_request("c", prompt=[99]), make_request("a"), make_request("before")):
        with pytest.raises(ValueError, match="Token id 99|'a' is in use|'before' is in use"):
            engine.generate([make_request("a"), make_request("b"), bad])
        assert list(engine._sequences) == ["before"]
    (made,) = engine.generate([make_request("a")])
    assert_same(made, reference(make_request("a")))


def test_weights_of_the_wrong_shape_are_refused() -> None:
    tensors = random_tensors(tiny_config())
    with pytest.raises(ValueError, match="the weights do not fit the configuration"):
        make_engine(tensors=tensors | {"layers.5.x": torch.ones(1)})


def test_generate_ends_if_one_of_its_requests_is_aborted() -> None:
    """It must not wait forever for the aborted request. The other requests finish first."""
    engine = make_engine()
    finished = []

    def abort_first(output: StepOutput) -> None:
        if output.request_id == "a":
            engine.abort("a")
        if output.request_output:
            finished.append(output.request_id)

    with pytest.raises(ValueError, match="'a' was aborted"):
        engine.generate([make_request("a"), make_request("b")], abort_first)
    assert finished == ["b"]
    assert_idle(engine)


def test_a_stop_string_may_begin_with_the_space_of_the_first_token() -> None:
    """SentencePiece drops the leading space of a text, but the new text must keep it."""

    def decode(tokens: list[int]) -> str:
        return "".join(f" {token}" for token in tokens).removeprefix(" ")

    (made,) = make_engine().generate([make_request()])
    engine = make_engine(detokenize=decode)
    (stopped,) = engine.generate([make_request(stop=(f" {made.token_ids[0]}",))])
    assert (stopped.token_ids, stopped.finish_reason) == (made.token_ids[:1], "stop")


@pytest.mark.parametrize(
    "execution", [ExecutionConfig(), ExecutionConfig("plain", cuda_graphs=True)]
)
@pytest.mark.parametrize("seed", range(3))
def test_requests_end_with_an_error_at_the_first_nan(seed: int, execution: ExecutionConfig) -> None:
    """One token gives NaN if it is in a prompt or sampled. If only drafted, it ends nothing."""
    traffic = poisoned_traffic(seed)
    engine = make_engine(traffic.config, tensors=traffic.tensors, execution=execution)
    for _ in range(2):
        made, _ = serve(engine, traffic.requests)
        traffic.check(made)


def test_blocks_of_an_aborted_request_leak_no_nan() -> None:
    """It is aborted during its prompt, before any exit detects NaN."""
    good = [make_request(f"{n}", prompt=[n] * n, strategy="full") for n in range(1, 6)]
    wanted = [reference(request) for request in good]
    used = {token for one in wanted for token in (*one.prompt_token_ids, *one.token_ids)}
    poison = next(token for token in range(40) if token not in used)
    tensors = random_tensors(tiny_config())
    tensors["embedding.word.weight"][poison] = math.nan
    engine = make_engine(tensors=tensors, num_blocks=17, max_pending=4, max_num_batched_tokens=4)
    engine.add(make_request("bad", prompt=[poison] * 20, strategy="full"))
    for _ in range(4):
        assert engine.step() == []
    engine.abort("bad")
    made, _ = serve(engine, good)
    for found, expected in zip(made, wanted, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("num_blocks", [9, 65])
@pytest.mark.parametrize("strategy", ["exact", "full", "self-speculative", "propagate"])
def test_nan_ends_only_its_own_request_and_does_not_stay_in_blocks(
    strategy: str, num_blocks: int
) -> None:
    """Later requests reuse blocks that contained NaN; with 8 blocks, they reuse all."""
    good = make_request("good", prompt=[1, 2, 3], strategy=strategy)
    later = [
        make_request(f"later{n}", prompt=[4, 5, 6, 8, 9 + n], strategy=strategy) for n in range(3)
    ]
    wanted = {one.id: reference(one).token_ids for one in (good, *later)}
    used = {token for tokens in wanted.values() for token in tokens}
    poison = next(t for t in range(12, 40) if t not in used)
    tensors = random_tensors(tiny_config())
    tensors["embedding.word.weight"][poison] = math.nan
    engine = make_engine(tensors=tensors, num_blocks=num_blocks)
    engine.add(good)
    for _ in range(2):
        engine.step()
    # Its leading blocks are full and are published before its first token is computed.
    prompt = [1, poison, *range(1, 12)]
    found = {}
    for number in range(2):  # the second request must not reuse the blocks of the first
        engine.add(make_request(f"bad{number}", prompt=prompt, strategy=strategy))
        for one in later[number::2]:
            engine.add(one)
        while engine.has_work:
            found |= {u.request_id: u.request_output for u in engine.step() if u.request_output}
            engine.scheduler.check_integrity()
    for number in range(2):
        bad = found.pop(f"bad{number}")
        assert (bad.token_ids, bad.finish_reason) == ((), "error")
    assert {id: one.token_ids for id, one in found.items()} == wanted
    assert_idle(engine)


@pytest.mark.parametrize("strategy", ["exact", "self-speculative", "propagate"])
def test_all_requests_continue_after_a_failed_pass(monkeypatch, strategy: str) -> None:
    engine = make_engine()
    requests = [make_request(f"{n}", 4 + n, strategy) for n in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    run, count = engine.runner.run, 0

    def fails_sometimes(scheduler_output):
        nonlocal count
        count += 1
        if count % 5 == 2:
            raise RuntimeError("out of memory")
        return run(scheduler_output)

    monkeypatch.setattr(engine.runner, "run", fails_sometimes)
    made, num_failures = {}, 0
    while engine.has_work:
        try:
            made |= {u.request_id: u.request_output for u in engine.step() if u.request_output}
        except RuntimeError:
            num_failures += 1
        engine.scheduler.check_integrity()
    assert num_failures > 1
    for request in requests:
        assert made[request.id].token_ids == reference(request).token_ids
    assert_idle(engine)


def test_a_tokenizer_error_ends_only_its_own_request() -> None:
    def decode(tokens: list[int]) -> str:
        if 13 in tokens:
            raise KeyError(13)
        return "".join(chr(97 + token % 26) for token in tokens)

    engine = make_engine(detokenize=decode)
    bad = make_request("bad", prompt=[1, 13], strategy="full", stop=("zzzz",))
    good = make_request("good", 5, strategy="full")
    made = engine.generate([bad, good])
    assert (made[0].finish_reason, len(made[0].token_ids)) == ("error", 1)
    assert made[1].token_ids == reference(good).token_ids
    assert_idle(engine)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_engine_continues_after_an_interrupted_pass(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """For example, Ctrl-C in a notebook during a step of requests that should continue."""
    engine, requests = make_engine(), one_of_each()
    for request in requests:
        engine.add(request)

    def interrupted(scheduler_output: SchedulerOutput) -> torch.Tensor:
        raise kind("before the runner has noted the pass's blocks")

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(kind):
        engine.step()
    monkeypatch.undo()
    made = []
    while engine.has_work:
        made += engine.step()
        engine.scheduler.check_integrity()
    found = {output.request_id: output.request_output for output in made if output.request_output}
    for request in requests:
        assert_same(found[request.id], reference(request))
    assert_idle(engine)


def test_an_interrupted_generate_leaves_no_state() -> None:
    engine = make_engine()

    def interrupt(output: StepOutput) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(one_of_each(), interrupt)
    assert_idle(engine)
    assert len(engine.generate(one_of_each())) == len(STRATEGIES)


def test_streams_do_not_take_outputs_of_other_streams() -> None:
    engine = make_engine()
    requests = [
        make_request("a", 4),
        make_request("b", 6, "self-speculative"),
        make_request("c", 5),
    ]
    engine.add(requests[2])
    streams = [engine.stream(request) for request in requests[:2]]
    found: list[list[int]] = [[], []]
    while streams_left := [n for n in (0, 1) if streams[n] is not None]:
        for number in streams_left:
            output = next(streams[number], None)
            if output is None:
                streams[number] = None
            else:
                found[number] += [token_output.token_id for token_output in output.tokens]
        if engine.has_work:
            engine.step()
    for request, tokens in zip(requests, found, strict=False):
        assert tuple(tokens) == reference(request).token_ids
    assert_idle(engine)


def test_a_stream_ends_with_its_request_even_when_its_id_is_reused() -> None:
    engine = make_engine()
    stream = engine.stream(make_request("x", 4))
    next(stream)
    engine.abort("x")
    engine.add(make_request("x", 9))
    with pytest.raises(RunError, match="Request 'x' was aborted before its end"):
        next(stream)
    assert list(stream) == []
    while engine.has_work:
        engine.step()
    assert_idle(engine)


def test_a_stream_refuses_an_invalid_request_immediately() -> None:
    with pytest.raises(ValueError, match="Token id 99 "):
        make_engine().stream(make_request("bad", prompt=[99]))
