"""Test `/v1/chat/completions` with OpenAI's client: its tokens are those of `LLM.chat`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from tests.unit.serving.servers import (
    EXITS,
    EXITS_OF_LLM,
    NAME,
    Running,
    running,
    save,
    save_template,
)

MESSAGES: Any = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def llm(run: Path) -> Iterator[LLM]:
    with LLM(run, dtype="float64", chat_template=save_template(run)) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server
        server.wait_until_idle()


def test_answers_equal_those_of_chat(llm: LLM, server: Running) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=4, n=2)
    expected = llm.chat(MESSAGES, params, exits=EXITS_OF_LLM)
    given: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 10, "seed": 4, "n": 2}
    given["extra_body"] = {"ee": EXITS}
    found = server.client.chat.completions.create(**given)
    assert found.object == "chat.completion"
    for choice, output in zip(found.choices, expected, strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == output.text
        assert choice.model_extra is not None
        assert choice.model_extra["ee"]["exits"] == list(output.exits)
        assert choice.model_extra["ee"]["seed"] == output.sampling_params.seed
    num_prompt = len(expected[0].prompt_token_ids)
    assert found.usage is not None
    assert found.usage.prompt_tokens == num_prompt
    assert found.usage.completion_tokens == sum(len(output.token_ids) for output in expected)

    stream = server.client.chat.completions.create(
        **given, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    texts, roles = [""] * 2, []
    for chunk in chunks:
        (choice_,) = chunk.choices
        texts[choice_.index] += choice_.delta.content or ""
        if choice_.delta.role:
            roles.append(choice_.index)
        assert chunk.object == "chat.completion.chunk"
    assert texts == [output.text for output in expected]
    assert roles == [0, 1]
    assert (last.choices, last.usage) == ([], found.usage)
    for index in range(2):
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices[0].index == index]
        assert reasons == [None] * (len(reasons) - 1) + [found.choices[index].finish_reason]


def test_a_content_may_be_a_list_of_texts(llm: LLM, server: Running) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (expected,) = llm.chat([{"role": "user", "content": parts}], SamplingParams(max_tokens=3))
    found = server.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": parts}], max_tokens=3, temperature=0
    )
    assert found.choices[0].message.content == expected.text


def test_logprobs(llm: LLM, server: Running) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(max_tokens=5, logprobs=2))
    given: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    (choice,) = server.client.chat.completions.create(
        **given, logprobs=True, top_logprobs=2
    ).choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert [one.logprob for one in content] == pytest.approx(list(expected.logprobs))
    for one, token, top in zip(content, expected.token_ids, expected.top_logprobs, strict=True):
        assert one.token == llm.decode([token])
        assert bytes(one.bytes or []).decode() == one.token
        assert [best.logprob for best in one.top_logprobs] == pytest.approx([v for _, v in top])
    (plain,) = server.client.chat.completions.create(**given, logprobs=True).choices
    assert plain.logprobs is not None
    assert [one.top_logprobs for one in plain.logprobs.content or []] == [[]] * 5
    (none,) = server.client.chat.completions.create(**given).choices
    assert none.logprobs is None


def test_an_answer_may_be_as_long_as_the_context(llm: LLM, server: Running) -> None:
    body = {"messages": MESSAGES, "ignore_eos": True}
    found = server.post("/v1/chat/completions", body).json()
    num_prompt = found["usage"]["prompt_tokens"]
    assert found["usage"]["completion_tokens"] == 64 - num_prompt + 1
    assert found["choices"][0]["finish_reason"] == "length"


def test_both_names_of_the_limit(server: Running) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": MESSAGES, "ignore_eos": True, name: 2}
        found = server.post("/v1/chat/completions", body).json()
        assert found["usage"]["completion_tokens"] == 2


def test_tokenize_formats_a_conversation(llm: LLM, server: Running) -> None:
    found = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert bytes(found["tokens"]).decode() == "<system>S<user>Hi<assistant>"


def test_a_model_without_a_template_cannot_chat(run: Path) -> None:
    with LLM(run, dtype="float64") as llm, running(llm) as server:
        with pytest.raises(openai.BadRequestError, match="has no chat template") as caught:
            server.client.chat.completions.create(model=NAME, messages=MESSAGES)
        assert caught.value.param == "messages"


def test_the_cache_limits_the_default_length(run: Path) -> None:
    """Otherwise, each answer without a limit would be refused, as too large for the cache."""
    with (
        LLM(
            run,
            dtype="float64",
            chat_template=save_template(run),
            max_num_seqs=1,
            cache_tokens=1,
        ) as llm,
        running(llm) as server,
    ):
        assert llm.engine.max_positions == 32
        body = {"messages": [{"role": "user", "content": ""}], "ignore_eos": True}
        found = server.post("/v1/chat/completions", body).json()
        usage = found["usage"]
        assert usage["total_tokens"] == 32 + 1
        for num_prompt, num_generated in ((16, 16), (30, 3), (32, 1)):
            body = {"prompt": "a" * num_prompt, "ignore_eos": True}
            found = server.post("/v1/completions", body).json()
            assert found["usage"]["completion_tokens"] == num_generated
        refused = server.post("/v1/completions", body | {"max_tokens": 2}).json()
        assert refused["error"]["param"] == "max_tokens"
