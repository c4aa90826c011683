"""Test `LLM`: outputs with text that do not depend on other requests, streams and errors."""

import gc
import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.cli.generation.live import LiveText
from ee_llm.errors import RequestError, RunError, UserError
from ee_llm.inference.decoding.settings import SLED, DoLa
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import SelfSpeculation
from ee_llm.inference.text.detokenizer import GeneratedText
from ee_llm.inference.verification.reference_decoding import generate_reference
from tests.ended import is_gone
from tests.unit.inference.models import random_tensors, tiny_config

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def save(output: Path, **config: object) -> Path:
    """Write a checkpoint of a random model whose tokens are bytes."""
    made = tiny_config(**{"vocab_size": 264, "max_seq_length": 64} | config)
    tensors = random_tensors(made, dtype=torch.float32)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_checkpoint(output, made, specs, tensors.__getitem__, tokenizer_file="bytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exits(run: Path) -> dict[int, float]:
    """Return thresholds that about half of the rows reach at each exit."""
    logits = load_reference(TensorReader(run)).forward(torch.arange(32, 96))
    medians = {b: logits[b].softmax(-1).amax(-1).median() for b in (1, 2)}
    return {b: float(median) for b, median in medians.items()}


@pytest.fixture(scope="module")
def llm(run: Path, tmp_path_factory: pytest.TempPathFactory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with LLM(run, dtype="float64", chat_template=template) as llm:
        yield llm


@pytest.mark.parametrize(
    "strategy", ["sled", "dola", SLED(rate=3.0, scale=40), DoLa(layers=(1, 3), alpha=0.01)]
)
def test_final_logits_are_contrasted_with_early_ones(llm: LLM, strategy: object) -> None:
    params = SamplingParams(max_tokens=8, repetition_penalty=1.1, logprobs=2)
    (output,) = llm.generate("Once", params, strategy=strategy)
    assert set(output.exits) == {4}
    assert llm.verify(output).passed
    streamed = list(llm.stream("Once", params, strategy=strategy))
    assert tuple(token.token_id for token in streamed) == output.token_ids
    (full,) = llm.generate("Once", params, strategy="full")
    assert full.logprobs != output.logprobs
    assert [top[0][1] for top in output.top_logprobs] >= list(output.logprobs)
    wrong = (*output.token_ids[:-1], output.token_ids[-1] ^ 1)
    assert not llm.verify(replace(output, token_ids=wrong)).passed


def test_a_contrast_ends_at_a_stop_string(llm: LLM) -> None:
    (output,) = llm.generate("Once", SamplingParams(max_tokens=20), strategy=DoLa(layers="high"))
    stop = output.text[3:5]
    params = SamplingParams(max_tokens=20, stop=stop)
    (stopped,) = llm.generate("Once", params, strategy=DoLa(layers="high"))
    assert stopped.finish_reason == "stop"
    assert stopped.text == output.text[: output.text.index(stop)]


@pytest.mark.parametrize("strategy", ["sled", DoLa()])
def test_a_contrast_takes_no_thresholds(llm: LLM, strategy: object) -> None:
    with pytest.raises(RequestError, match="runs every token through all layers, so exits"):
        llm.generate("Once", exits=0.9, strategy=strategy)
    (output,) = llm.generate("Once", SamplingParams(max_tokens=1), exits="off", strategy=strategy)
    assert output.exits == (4,)


def test_outputs_equal_the_reference(llm: LLM, run: Path, exits: dict) -> None:
    model = load_reference(TensorReader(run), torch.float64)
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=7, min_tokens=3)
    outputs = llm.generate(["Once", "def main("], params, exits=exits)
    for output, prompt in zip(outputs, ["Once", "def main("], strict=True):
        expected = generate_reference(
            model, list(prompt.encode()), output.policy, params, eos_token_ids=(256,)
        )
        assert output.token_ids == expected.token_ids
        assert output.exits == expected.exits
        assert output.prompt == prompt
        assert output.text == "".join(token.text for token in output.tokens)
        assert [token.exit for token in output.tokens] == list(output.exits)
    assert {exit for output in outputs for exit in output.exits} == {1, 2, 4}
    assert llm.verify(outputs).passed


def test_a_single_prompt_and_token_ids(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5)
    (text,) = llm.generate("Once", params)
    (ids,) = llm.generate(list(b"Once"), params)
    pair = llm.generate([list(b"Once"), "Once"], params)
    assert text.token_ids == ids.token_ids == pair[0].token_ids == pair[1].token_ids
    assert ids.prompt == "Once"


def test_the_fingerprint_is_computed_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output record contains it, and for old checkpoints it reads the whole file."""
    first = llm.fingerprint
    monkeypatch.setattr(TensorReader, "fingerprint", lambda self: pytest.fail("computed again"))
    assert llm.fingerprint == first


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    outputs = llm.generate(
        ["a", "b"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 4)]
    )
    assert [len(output.token_ids) for output in outputs] == [2, 4]
    with pytest.raises(RequestError, match=r"sampling_params has 1 entries for 2"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_n_samples_have_different_seeds_and_are_consecutive(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=5)
    outputs = llm.generate(["a", "b"], params)
    assert [output.index for output in outputs] == [0, 1, 2, 0, 1, 2]
    assert len({output.token_ids for output in outputs[:3]}) == 3
    (first,) = llm.generate("a", SamplingParams(temperature=1.0, max_tokens=8, seed=5))
    assert outputs[0].token_ids == first.token_ids
    assert llm.generate("a", params)[1].token_ids == outputs[1].token_ids


def test_min_tokens_bans_end_and_stop_tokens_before_it(llm: LLM) -> None:
    (free,) = llm.generate("Once", SamplingParams(max_tokens=12))
    stops = tuple(set(free.token_ids))
    params = SamplingParams(max_tokens=12, min_tokens=4, stop_token_ids=stops)
    (output,) = llm.generate("Once", params)
    assert not {*output.token_ids[:4]} & {*stops}
    assert output.finish_reason == "stop" or len(output.token_ids) == 12
    assert len(output.token_ids) > 4
    assert llm.verify(output).passed


def test_a_stop_string_does_not_end_the_first_tokens(llm: LLM) -> None:
    (free,) = llm.generate("Once", SamplingParams(max_tokens=24))
    assert free.text is not None
    stop = next(c for c in free.text if c.isascii())
    at = next(i for i, token in enumerate(free.tokens) if stop in token.text)
    (early,) = llm.generate("Once", SamplingParams(max_tokens=24, stop=[stop]))
    assert (early.finish_reason, stop in (early.text or "")) == ("stop", False)
    (late,) = llm.generate("Once", SamplingParams(max_tokens=24, stop=stop, min_tokens=at + 1))
    assert (late.text or "")[: len(early.text or "") + 1] == (early.text or "") + stop
    assert len(late.token_ids) > len(early.token_ids)


def test_logprobs_are_the_most_probable_tokens_of_the_exit(llm: LLM, run: Path, exits) -> None:
    (output,) = llm.generate("Once", SamplingParams(max_tokens=4, logprobs=3), exits=exits)
    model = load_reference(TensorReader(run), torch.float64)
    logits = model.forward(torch.tensor([*output.prompt_token_ids, *output.token_ids]))
    for index, token in enumerate(output.tokens):
        row = logits[token.exit][len(output.prompt_token_ids) - 1 + index].log_softmax(-1)
        top = row.topk(3)
        assert [id for id, _ in token.top_logprobs] == top.indices.tolist()
        values = [value for _, value in token.top_logprobs]
        assert values == pytest.approx(top.values.tolist(), abs=1e-9)
        assert token.top_logprobs[0] == (token.token_id, pytest.approx(token.logprob))


@pytest.mark.parametrize(
    "exits",
    [{1: 0.5, 2: "off"}, {1: 0.5}, ExitPolicy((1, 2), (0.5, None)), "file"],
    ids=["all", "one", "policy", "file"],
)
def test_exits_accept_thresholds_policies_and_files(
    llm: LLM, tmp_path: Path, exits: object
) -> None:
    policy = ExitPolicy((1, 2), (0.5, None))
    if exits == "file":
        exits = tmp_path / "policy.json"
        policy.save(exits)
        assert json.loads(exits.read_text())["thresholds"] == {"1": 0.5, "2": None}
    (output,) = llm.generate("a", SamplingParams(max_tokens=1), exits=exits)
    assert output.policy == policy


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ({3: 0.5}, r"\{3: 0.5\}: 3 is not an exit.*\[1, 2\]"),
        (1.5, "1.5 is not in"),
        (True, "True"),
        ("no/such/file.json", "no/such/file.json cannot be read"),
        (ExitPolicy((1,), (0.5,)), r"\[1\].*\[1, 2\]"),
    ],
)
def test_errors_name_invalid_exits(llm: LLM, exits: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate("a", exits=exits)


def test_strategies_can_be_names_or_objects(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10)
    (full,) = llm.generate("Once", params, strategy="full")
    (by_name,) = llm.generate("Once", params, strategy="self-speculative")
    own = SelfSpeculation(draft_exit=2, draft_length=2)
    (by_object,) = llm.generate("Once", params, strategy=own)
    assert full.token_ids == by_name.token_ids == by_object.token_ids
    assert by_object.num_drafted > 0
    with pytest.raises(RequestError, match=r"draft_exit = 3 .*\[1, 2\]"):
        llm.generate("Once", strategy=SelfSpeculation(draft_exit=3))


def test_a_model_without_exits_cannot_speculate(tmp_path: Path) -> None:
    with LLM(save(tmp_path, boundaries=()), dtype="float64") as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2))[0].exits == (4, 4)
        with pytest.raises(RequestError, match="self-speculative"):
            llm.generate("a", strategy="self-speculative")


@pytest.mark.parametrize("stop", [(), ("e", "xyz")])
def test_a_stream_yields_the_text_of_the_output(llm: LLM, stop: tuple[str, ...]) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, stop=stop)
    (output,) = llm.generate("Once", params)
    stream = llm.stream("Once", params)
    tokens = list(stream)
    assert "".join(token.text for token in tokens) == output.text
    assert [token.token_id for token in tokens] == list(output.token_ids)
    assert stream.output is not None
    assert stream.output.text == output.text
    assert stream.output.pieces == output.pieces


def test_the_time_per_token_of_a_stream_does_not_grow_with_its_text(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole text, and the list of all tokens, are built for the final output only."""
    counts = {"text": 0, "new_tokens": 0}

    def count(owner: type, name: str) -> None:
        build = getattr(owner, name).fget

        def counted(self: object) -> object:
            counts[name] += 1
            return build(self)

        monkeypatch.setattr(owner, name, property(counted))

    count(GeneratedText, "text")
    count(Sequence, "new_tokens")
    stream = llm.stream("Once", SamplingParams(max_tokens=20, stop="never", ignore_eos=True))
    console = Console(file=StringIO())
    live = LiveText(console, stream.generated, ExitPolicy((1, 2), (None, None)), 4)
    text = ""
    for token in stream:
        live.show(4)
        text += token.text
    assert counts["text"] <= 2
    assert counts["new_tokens"] <= 1
    assert stream.output is not None
    assert text == stream.output.text


def test_a_failed_request_keeps_its_tokens_and_its_text(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer cannot decode its sixth token, in the engine and elsewhere."""
    params = SamplingParams(max_tokens=20, stop="never", ignore_eos=True)
    (whole,) = llm.generate("Once", params)
    bad = whole.token_ids[5]
    assert bad not in whole.token_ids[:5]

    def decode(tokens: list[int]) -> str:
        if bad in tokens:
            raise RuntimeError("cannot be decoded")
        return LLM.decode(llm, tokens)

    monkeypatch.setattr(llm, "decode", decode)
    monkeypatch.setattr(llm.engine, "_detokenize", decode)
    stream = llm.stream("Once", params)
    tokens = []
    with pytest.raises(RunError, match="cannot be decoded"):
        tokens += stream  # `+=` keeps the tokens before the exception.
    assert list(stream) == []
    assert [token.token_id for token in tokens] == list(whole.token_ids[:6])
    (output,) = llm.generate("Once", params)
    for found in (output, stream.output):
        assert found is not None
        assert (found.finish_reason, found.token_ids) == ("error", whole.token_ids[:6])
        assert found.pieces == (*whole.pieces[:5], "")
        assert found.text == "".join(whole.pieces[:5])
    assert "".join(token.text for token in tokens) == output.text


@pytest.mark.parametrize("how", ["close", "context", "drop"])
def test_an_unfinished_stream_aborts_its_request(llm: LLM, how: str) -> None:
    stream = llm.stream("Once", SamplingParams(max_tokens=40))
    next(stream)
    assert llm.engine.has_work
    if how == "close":
        stream.close()
    elif how == "context":
        with stream:
            next(stream)
    else:
        del stream
        gc.collect()
    assert not llm.engine.has_work


def test_an_interrupted_run_leaves_no_request(llm: LLM) -> None:
    prompts = [llm.encoder.encode_text(text) for text in "ab"]
    requests = [
        llm.make_request(p, SamplingParams(max_tokens=n))
        for p, n in zip(prompts, (1, 30), strict=True)
    ]
    outputs = llm.run(requests, {request.id: "" for request in requests})
    next(outputs)
    outputs.close()
    assert not llm.engine.has_work


def test_two_requests_with_the_same_id_are_refused(llm: LLM) -> None:
    """One of them would get no output."""
    params = SamplingParams(max_tokens=2)
    requests = [llm.make_request(llm.encoder.encode_text(text), params, id="x") for text in "ab"]
    with pytest.raises(RequestError, match="Request id 'x' is in use"):
        list(llm.run(requests, {"x": ""}))
    assert not llm.engine.has_work


def test_several_threads_may_generate_and_stream(llm: LLM) -> None:
    """Their requests share batches, and each gets its own outputs."""
    params = SamplingParams(max_tokens=8)
    prompts = [f"prompt {number}" for number in range(4)]
    expected = [output.token_ids for output in llm.generate(prompts, params)]

    def generate(prompt: str) -> set[tuple[int, ...]]:
        return {llm.generate(prompt, params)[0].token_ids for _ in range(10)}

    def stream(prompt: str) -> set[tuple[int, ...]]:
        return {tuple(token.token_id for token in llm.stream(prompt, params)) for _ in range(10)}

    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(call, one) for call in (generate, stream) for one in prompts]
        results = [future.result(timeout=300) for future in found]
    assert results == [{tokens} for tokens in expected * 2]
    assert not llm.engine.has_work


def test_closing_the_model_ends_the_generation_of_another_thread(run: Path) -> None:
    llm = LLM(run, dtype="float64")
    with ThreadPoolExecutor(1) as threads:
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        found = threads.submit(lambda: [llm.generate("a", params) for _ in range(1000)])
        while not llm.engine.has_work:
            assert not found.done()
        llm.close()
        with pytest.raises((RequestError, RunError), match="closed|aborted"):
            found.result(timeout=100)


def test_chat_formats_with_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(max_tokens=4)
    (output,) = llm.chat(messages, params)
    assert output.prompt == "<user>Hello<assistant>"
    assert [one.token_ids for one in llm.chat([messages, messages], params)] == [
        output.token_ids,
        output.token_ids,
    ]
    assert "".join(token.text for token in llm.stream(messages, params)) == output.text
    with pytest.raises(RequestError, match="conversation 1.*role"):
        llm.chat([{"content": "Hello"}])


def test_a_wrong_output_fails_the_certificate(llm: LLM) -> None:
    from dataclasses import replace

    (output,) = llm.generate("Once", SamplingParams(max_tokens=6))
    wrong = replace(output, token_ids=(*output.token_ids[:-1], (output.token_ids[-1] + 1) % 256))
    report = llm.verify([output, wrong])
    assert not report.passed
    assert (report.num_generations, report.num_unexplained) == (2, 1)
    assert "1 of them beyond rounding" in str(report)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "empty"),
        ([""], "empty"),
        ([[]], "empty"),
        (["a", 5], r"prompts\[1\] is 5"),
        ([264], "264"),
        (None, "prompts = None"),
        (b"Once", "prompts = b'Once'"),
        ({"prompt": "Once"}, "prompts = {'prompt'"),
        ([["a", "b"]], r"\['a', 'b'\]"),
        (["\ud800"], "Unicode"),
    ],
)
def test_invalid_prompts_are_refused_before_anything_runs(llm: LLM, prompts, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "messages",
    [None, "Hello", {"role": "user", "content": "Hello"}, [], ["Hello"]],
    ids=["none", "text", "message", "empty", "texts"],
)
def test_an_invalid_conversation_is_refused(llm: LLM, messages: object) -> None:
    with pytest.raises(RequestError, match="conversation 1"):
        llm.chat(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params = {'max_tokens'"),
        ({"sampling_params": [None]}, r"sampling_params = \[None\]"),
        ({"bos": "yes"}, "bos = 'yes'"),
        ({"exits": {1: "high"}}, "'high'"),
        ({"strategy": "verify"}, "'verify'"),
    ],
)
def test_errors_name_invalid_arguments(llm: LLM, arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate("Once", **arguments)
    assert not llm.engine.has_work


def test_errors_of_a_policy_file_name_the_file(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"thresholds": {"1": 1.5}}')
    with pytest.raises(RequestError, match=r"policy\.json.*1\.5"):
        llm.generate("Once", exits=path)


def test_closing_the_model_ends_its_streams(run: Path) -> None:
    llm = LLM(run, dtype="float64")
    stream = llm.stream([72, 105], SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(RunError, match="'1' was aborted before its end"):
        list(stream)
    assert list(stream) == []
    assert stream.output is None
    with pytest.raises(RequestError, match="closed"):
        llm.worker_loop()


def test_a_worker_takes_no_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "is_leader", False)
    request = llm.make_request(llm.encoder.encode_text("a"), SamplingParams())
    for call in (
        lambda: llm.generate("a"),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.stream("a"),
        lambda: list(llm.run([request], {request.id: "a"})),
    ):
        with pytest.raises(RequestError, match=r"This rank is a worker. Call worker_loop\(\)."):
            call()


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_request_that_somebody_else_aborts_is_reported(run: Path, how: str) -> None:
    with LLM(run, dtype="float64") as llm:
        with_text = llm._with_text

        def interfere(*arguments: object) -> object:
            if how == "close":
                llm.close()
            else:
                llm.engine.abort_all()
            return with_text(*arguments)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llm, "_with_text", interfere)
            params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 30)]
            with pytest.raises(RunError, match="'2' was aborted before its end"):
                llm.generate(["a", "b"], params)


def test_an_exception_of_the_caller_leaves_no_request(llm: LLM) -> None:
    """A stored traceback keeps references to the frames of generators."""

    class Failed(Exception):
        pass

    def fail(*_: object) -> None:
        raise Failed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "_with_text", fail)
        with pytest.raises(Failed) as error:
            llm.generate(["a", "b"], [SamplingParams(max_tokens=n) for n in (1, 30)])
    assert not llm.engine.has_work
    assert error.traceback


def test_a_tokenizer_larger_than_the_model_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer of bytes has 257 tokens, the last of them the end token."""
    with LLM(save(tmp_path / "256", vocab_size=256), dtype="float64") as llm:
        assert "257 tokens, but model.vocab_size = 256" in caplog.text
        (output,) = llm.generate("a", SamplingParams(max_tokens=3, min_tokens=2))
        assert len(output.token_ids) == 3
        assert llm.verify(output).passed
    caplog.clear()
    LLM(save(tmp_path / "padded", vocab_size=320), dtype="float64").close()
    assert not caplog.records


def test_calls_on_a_closed_model_are_errors(run: Path) -> None:
    llm = LLM(run, dtype="float64")
    assert repr(llm).startswith("LLM(")
    assert "exits=[1, 2]" in repr(llm)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        llm.generate("a")
    assert "closed" in repr(llm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3}, "tensor = 3"),
        ({"tensor": 0}, "tensor = 0"),
        ({"max_num_seqs": 1.5}, "max_num_seqs = 1.5"),
        ({"timeout_s": float("nan")}, "timeout_s = nan"),
        ({"exits": {9: 0.5}}, "9 is not an exit"),
        ({"dtype": "float8"}, "float8"),
        ({"quantize": "int4"}, "quantize = 'int4'"),
        ({"deferral": "on"}, "deferral = 'on'"),
        ({"deferral": ["auto"]}, r"deferral = \['auto'\]"),
        ({"attention": "fast"}, "attention = 'fast'"),
        ({"timeout_s": "5"}, "timeout_s = '5' must be a number"),
        ({"timeout_s": True}, "timeout_s = True"),
        ({"compile": "no"}, "compile = 'no' must be True or False"),
        ({"cuda_graphs": 1}, "cuda_graphs = 1 must be True or False"),
        ({"chat_template": 5}, "chat_template = 5"),
        ({"dtype": ["float32"]}, r"dtype = \['float32'\]"),
        ({"dtype": None}, "dtype = None"),
        ({"max_num_seqs": "4"}, "max_num_seqs = '4'"),
    ],
)
def test_errors_name_invalid_options(run: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM(run, **options)


def test_repr_is_readable_and_html_is_escaped(llm: LLM, exits) -> None:
    (output,) = llm.generate("<b>Once</b>", SamplingParams(max_tokens=12), exits=exits)
    assert re.fullmatch(r"RequestOutput\(text='.*', num_tokens=12, mean_depth=.*\)", repr(output))
    html = output._repr_html_()
    assert "&lt;b&gt;Once&lt;/b&gt;" in html
    assert "<b>" not in html
    assert f"mean depth {output.mean_depth:.2f} of 4 layers" in html


_SCRIPT = """
import json, sys
from ee_llm import LLM, SamplingParams
path, layout = sys.argv[1], json.loads(sys.argv[2])
params = SamplingParams(max_tokens=12, temperature=0.8, seed=7)
for _ in range(2):  # nothing of the first engine is in the way of the second
    with LLM(path, dtype="float64", **layout) as llm:
        outputs = llm.generate(["Once", "def main("], params)
        assert llm.verify(outputs).passed
print(json.dumps([output.token_ids for output in outputs]))
"""


_LEFT_OPEN = """
import sys
from ee_llm import LLM
llm = LLM(sys.argv[1], dtype="float32", pipeline=2)
llm.generate("Once" * int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "status"), [(1, 0), (100, 1)])
def test_a_program_that_does_not_close_its_ranks_exits_quietly(
    run: Path, count: int, status: int
) -> None:
    """Such programs sometimes aborted, and their workers printed that a rank was lost."""
    command = [sys.executable, "-c", _LEFT_OPEN, str(run), f"{count}"]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stderr
        assert not re.search("terminate|rank1|lost another rank", done.stderr), done.stderr
        assert ("max_seq_length" in done.stderr) == (status == 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}])
def test_other_ranks_are_started_and_stopped(run: Path, llm: LLM, layout: dict[str, int]) -> None:
    """This runs in a new process, because a process group must contain only ranks."""
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=7)
    expected = [list(output.token_ids) for output in llm.generate(["Once", "def main("], params)]
    command = [sys.executable, "-c", _SCRIPT, str(run), json.dumps(layout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


_FAILING = """
import sys, time
from ee_llm import LLM, RunError
from ee_llm.inference.ranks import workers
workers._START = "import sys; sys.exit(3)"
start = time.monotonic()
for _ in range(2):  # nothing of the first attempt is in the way of the second
    try:
        LLM(sys.argv[1], tensor=2)
    except RunError as error:
        assert "Rank 1" in str(error) and "3" in str(error), error
    else:
        raise AssertionError
assert time.monotonic() - start < 60
"""


def test_a_rank_that_does_not_start_is_reported_immediately(run: Path) -> None:
    command = [sys.executable, "-c", _FAILING, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


_BUILT_IN_A_THREAD = """
import sys, threading
from ee_llm import LLM, SamplingParams
made = []
thread = threading.Thread(target=lambda: made.append(LLM(sys.argv[1], dtype="float32", tensor=2)))
thread.start()
thread.join()
with made[0] as llm:
    assert len(llm.generate("a", SamplingParams(max_tokens=2))[0].token_ids) == 2
"""

_RECORDED = """
import subprocess
started = []

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        started.append(self)

subprocess.Popen = Popen
"""

_KILLED = (
    _RECORDED
    + """
import os, signal, sys
from ee_llm import LLM
llm = LLM(sys.argv[1], dtype="float32", tensor=2)
print(started[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
)


def _run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own: a process group is for ranks alone."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_workers_outlive_the_thread_that_started_them(run: Path) -> None:
    done = _run_script(_BUILT_IN_A_THREAD, run)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_workers_end_when_their_leader_is_killed(run: Path) -> None:
    done = _run_script(_KILLED, run)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_gone(int(done.stdout))


_LEFT_TO_THE_COLLECTOR = (
    _RECORDED
    + """
import gc, os, signal, sys
import torch
from ee_llm import LLM, SamplingParams, distributed
from ee_llm.errors import RunError, UserError

def load():
    return LLM(sys.argv[1], dtype="float32", tensor=2)

environment, params = dict(os.environ), SamplingParams(max_tokens=2)
llm = load()
assert dict(os.environ) == environment
try:
    distributed.initialize()
except UserError as error:
    assert "Close the LLM" in str(error)
assert llm.generate("a", params)
del llm
gc.collect()
assert started[0].poll() is not None
assert not torch.distributed.is_initialized()

llm = load()
os.kill(started[1].pid, signal.SIGKILL)
try:
    llm.generate("a", params)
except RunError as error:
    assert str(error) == "Rank 1 of the engine ended: killed by signal 9", error
else:
    raise AssertionError("the lost rank was not noticed")
llm.close()

def fail(*arguments, **options):
    raise OSError("no process")

subprocess.Popen = fail
try:
    load()
except OSError as error:
    assert str(error) == "no process"
assert dict(os.environ) == environment
assert not torch.distributed.is_initialized()
"""
)


@pytest.mark.slow
def test_ranks_leave_nothing_behind(run: Path) -> None:
    """No process, process group or variable of the environment."""
    done = _run_script(_LEFT_TO_THE_COLLECTOR, run)
    assert done.returncode == 0, done.stderr
