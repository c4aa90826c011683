"""Test `/v1/completions` with OpenAI's client: its tokens are those of `LLM.generate`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.serving.servers import EXITS, EXITS_OF_LLM, NAME, Running, running, save


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(save(tmp_path_factory.mktemp("run")), dtype="float64") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server
        server.wait_until_idle()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: fields of the request, the same sampling parameters, and arguments of `generate`
    "greedy": ({"temperature": 0}, {}, {}),
    "seeded": ({"seed": 5}, {"temperature": 1.0, "seed": 5}, {}),
    "exits": ({"temperature": 0, "ee": EXITS}, {}, {"exits": EXITS_OF_LLM}),
    "sampling": (
        {
            "temperature": 0.7,
            "seed": 9,
            "top_p": 0.9,
            "extra": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True},
        },
        {
            "temperature": 0.7,
            "seed": 9,
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "ignore_eos": True,
        },
        {},
    ),
    "full": ({"temperature": 0, "ee": {"strategy": "full"}}, {}, {"strategy": "full"}),
    "dola": ({"temperature": 0, "ee": {"strategy": "dola"}}, {}, {"strategy": "dola"}),
    "off": ({"temperature": 0, "ee": {"thresholds": "off"}}, {}, {"exits": "off"}),
}


def fields_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of OpenAI's client, which knows neither `ee` nor vLLM's fields."""
    known = {name: value for name, value in case.items() if name not in ("ee", "extra")}
    return known | {"extra_body": case.get("extra", {}) | {"ee": case.get("ee", {})}}


@pytest.mark.parametrize("case", CASES)
def test_completions_equal_those_of_generate(llm: LLM, server: Running, case: str) -> None:
    fields, params, options = CASES[case]
    fields = fields | {"ee": fields.get("ee", {}) | {"return_exits": True}}
    (expected,) = llm.generate("Once", SamplingParams(max_tokens=12, **params), **options)
    given = fields_of(fields) | {"model": NAME, "prompt": "Once", "max_tokens": 12}
    found = server.client.completions.create(**given)
    (choice,) = found.choices
    assert choice.text == expected.text
    assert choice.finish_reason == ("stop" if expected.finish_reason == "eos" else "length")
    assert (found.model, found.object) == (NAME, "text_completion")
    count = len(expected.token_ids)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, count)
    assert found.usage.total_tokens == 4 + count
    ee = choice.model_extra["ee"]
    assert ee["exits"] == list(expected.exits)
    assert ee["confidences"] == pytest.approx(list(expected.confidences))
    assert ee["digest"] == expected.policy.digest
    assert ee["mean_depth"] == expected.mean_depth
    assert ee["policy"]["thresholds"] == {
        str(b): expected.policy.threshold(b) for b in expected.policy.boundaries
    }

    chunks = list(server.client.completions.create(**given, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert len(chunks) == count
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (count - 1) + [choice.finish_reason]
    exits = [chunk.choices[0].model_extra["ee"]["exits"] for chunk in chunks]
    assert exits == [[exit] for exit in expected.exits]
    last = chunks[-1].choices[0].model_extra["ee"]
    assert (last["digest"], last["mean_depth"]) == (ee["digest"], ee["mean_depth"])
    assert "digest" not in chunks[0].choices[0].model_extra["ee"]


def test_early_exits_are_among_the_tests(llm: LLM) -> None:
    (output,) = llm.generate("Once", SamplingParams(max_tokens=12), exits=EXITS_OF_LLM)
    assert len(set(output.exits)) > 1


def test_speculation_sends_a_chunk_for_each_token(llm: LLM, server: Running) -> None:
    """Only the last one ends the choice, though the last step confirms several tokens."""
    ee = {"strategy": "self-speculative", "draft_exit": 2, "draft_length": 3}
    params = SamplingParams(max_tokens=13)
    strategy = SelfSpeculation(draft_exit=2, draft_length=3)
    request = llm.make_request(llm.encode_prompt("Once"), params, strategy=strategy)
    assert [len(step.tokens) for step in llm.engine.stream(request)][-1] > 1
    (expected,) = llm.generate("Once", params, strategy="full")
    chunks = list(
        server.client.completions.create(
            model=NAME,
            prompt="Once",
            max_tokens=13,
            temperature=0,
            stream=True,
            extra_body={"ee": ee | {"return_exits": True}},
        )
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 12 + ["length"]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text


def test_prompts_and_samples_are_choices_in_order(llm: LLM, server: Running) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=2)
    expected = [output.text for output in llm.generate(["a", "bc"], params)]
    given: dict[str, Any] = {"model": NAME, "max_tokens": 6, "seed": 3, "n": 2}
    for prompt in (["a", "bc"], [[97], [98, 99]]):
        found = server.client.completions.create(prompt=prompt, **given)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in found.choices] == expected
        assert found.usage is not None
        assert found.usage.prompt_tokens == 3
    texts = [""] * 4
    for chunk in server.client.completions.create(prompt=["a", "bc"], stream=True, **given):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_token_ids_are_one_prompt(llm: LLM, server: Running) -> None:
    (expected,) = llm.generate([97, 98], SamplingParams(max_tokens=5))
    found = server.client.completions.create(
        model=NAME, prompt=[97, 98], max_tokens=5, temperature=0
    )
    assert [choice.text for choice in found.choices] == [expected.text]


def test_stop_strings_and_tokens_end_a_completion(llm: LLM, server: Running) -> None:
    (free,) = llm.generate("Once", SamplingParams(max_tokens=20))
    assert free.text is not None
    stop = next(c for c in free.text[1:] if c.isascii())
    given: dict[str, Any] = {"model": NAME, "prompt": "Once", "max_tokens": 20, "temperature": 0}
    for stops in (stop, [stop, "never"]):
        (choice,) = server.client.completions.create(**given, stop=stops).choices
        assert choice.text == free.text[: free.text.index(stop)]
        assert choice.finish_reason == "stop"
        chunks = list(server.client.completions.create(**given, stop=stops, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
        assert chunks[-1].choices[0].finish_reason == "stop"
    token = free.token_ids[3]
    found = server.client.completions.create(**given, extra_body={"stop_token_ids": [token]})
    assert found.usage is not None
    assert found.usage.completion_tokens == free.token_ids.index(token) + 1


def test_echo_returns_the_prompt(llm: LLM, server: Running) -> None:
    (expected,) = llm.generate("Once", SamplingParams(max_tokens=6))
    given: dict[str, Any] = {"model": NAME, "prompt": "Once", "max_tokens": 6, "temperature": 0}
    (choice,) = server.client.completions.create(**given, echo=True).choices
    assert choice.text == f"Once{expected.text}"
    chunks = list(server.client.completions.create(**given, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_logprobs_are_those_of_the_exit(llm: LLM, server: Running) -> None:
    params = SamplingParams(max_tokens=6, logprobs=3)
    (expected,) = llm.generate("Once", params, exits=EXITS_OF_LLM)
    given: dict[str, Any] = {
        "model": NAME,
        "prompt": "Once",
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 3,
        "extra_body": {"ee": EXITS},
    }
    (choice,) = server.client.completions.create(**given).choices
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx(list(expected.logprobs))
    assert found.tokens == [llm.decode([token]) for token in expected.token_ids]
    for ours, theirs in zip(found.top_logprobs or [], expected.top_logprobs, strict=True):
        best = {llm.decode([token]): value for token, value in reversed(theirs)}
        assert ours == pytest.approx(best)
    streamed = [
        chunk.choices[0].logprobs
        for chunk in server.client.completions.create(**given, stream=True)
    ]
    assert [one.tokens[0] for one in streamed] == found.tokens
    assert [one.text_offset[0] for one in streamed] == found.text_offset
    assert [one.top_logprobs[0] for one in streamed] == found.top_logprobs


def events(server: Running, **fields: Any) -> list[Any]:
    """Return the events of a stream as the server sends them."""
    body = {"prompt": "Once", "max_tokens": 3, "temperature": 0, "stream": True} | fields
    response = server.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = response.text.split("\n\n")
    assert end == ""
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_streams_have_no_usage_by_default(server: Running, options: Any) -> None:
    found = events(server, **({} if options is None else {"stream_options": options}))
    assert [one["choices"][0]["finish_reason"] for one in found] == [None, None, "length"]
    assert not any("usage" in one for one in found)
    assert all(one["choices"][0]["logprobs"] is None for one in found)
    assert len({one["id"] for one in found}) == 1


def test_streams_end_with_the_usage_on_request(server: Running) -> None:
    *found, last = events(server, stream_options={"include_usage": True})
    assert [one["usage"] for one in found] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_defaults_are_those_of_openai(server: Running) -> None:
    """16 tokens, at temperature 1 with a random seed."""
    given = {"prompt": "Once", "ignore_eos": True}
    found = [server.post("/v1/completions", given).json() for _ in range(2)]
    assert [one["usage"]["completion_tokens"] for one in found] == [16, 16]
    assert found[0]["choices"][0]["text"] != found[1]["choices"][0]["text"]


def test_models_and_tokens(llm: LLM, server: Running) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.model_extra["max_model_len"]) == (NAME, 64)
    assert server.client.models.retrieve(NAME).id == NAME
    found = server.post("/tokenize", {"prompt": "é!", "return_token_strs": True}).json()
    assert found["tokens"] == list("é!".encode())
    assert (found["count"], found["token_strs"][-1], found["max_model_len"]) == (3, "!", 64)
    back = server.post("/detokenize", {"tokens": found["tokens"]}).json()
    assert back == {"prompt": "é!"}
    assert server.get("/version").json().keys() == {"version"}


def test_the_schema_describes_bodies(server: Running) -> None:
    """Without FastAPI's own pages, which load scripts from other servers."""
    schema = server.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    fields = schema["components"]["schemas"][name]["properties"]
    assert {"prompt", "echo", "ee", "stop_token_ids"} <= fields.keys()
    for path in ("/docs", "/redoc"):
        assert server.get(path).status_code == 404


def test_responses_have_the_id_of_the_request(server: Running) -> None:
    assert server.get("/live", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    for id in ("a b", "x" * 200):
        made = server.get("/live", headers={"x-request-id": id}).headers["x-request-id"]
        assert made != id
        assert len(made) == 32
    assert isinstance(httpx.get(f"{server.url}/nowhere").headers["x-request-id"], str)


def test_requests_are_logged_without_their_text(
    server: Running, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level("INFO", logger="ee_llm"):
        body = {"prompt": "secret", "max_tokens": 2, "ee": EXITS}
        found = server.post("/v1/completions", body, headers={"x-request-id": "mine"}).json()
        server.wait_until_idle()
    (line,) = [one.getMessage() for one in caplog.records if "mine" in one.getMessage()]
    assert "6 prompt tokens, 2 generated" in line
    assert found["choices"][0]["ee"]["digest"] in line
    assert "secret" not in caplog.text
