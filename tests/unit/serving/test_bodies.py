"""Test that every wrong body gets an error that names the parameter, and never status 500."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from ee_llm.inference.llm import LLM
from tests.unit.serving.servers import NAME, Running, running, save


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with (
        LLM(save(tmp_path_factory.mktemp("run")), dtype="float64") as llm,
        running(llm, max_body_mib=0.25) as server,
    ):
        yield server
        server.wait_until_idle()
        # The engine still works after all these requests.
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


def with_fields(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 2} | fields).encode()


# Bodies of /v1/completions, the parameter that the error names, and words of its message.
COMPLETIONS: dict[str, tuple[bytes, str | None, str]] = {
    "empty": (b"", None, "not valid JSON"),
    "half": (b'{"prompt": "a"', None, "not valid JSON"),
    "list": (b"[]", None, "must be a JSON object"),
    "null": (b"null", None, "must be a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}', None, "not UTF-8"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', None, "'prompt' twice"),
    "long number": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None, "digits"),
    "deep": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, "nested too deeply"),
    "deep enough": (b'{"x": ' + b"[" * 80 + b"]" * 80 + b"}", "x", "nested too deeply"),
    "surrogate": (b'{"prompt": "a\\ud800"}', "prompt", "unpaired surrogate"),
    "surrogate in a stop": (with_fields(stop=["\ud800"]), "stop", "unpaired surrogate"),
    "surrogate in a name": (b'{"prompt": "a", "\\udfff": 1}', None, "unpaired surrogate"),
    "no prompt": (b"{}", "prompt", "prompt is missing"),
    "number": (with_fields(prompt=5), "prompt", "neither a text nor a list"),
    "empty prompt": (with_fields(prompt=""), "prompt", "is empty"),
    "no prompts": (with_fields(prompt=[]), "prompt", "0 prompts"),
    "empty ids": (with_fields(prompt=[[]]), "prompt", "is empty"),
    "mixed": (with_fields(prompt=[1, "a"]), "prompt", "neither a text nor a list"),
    "truth": (with_fields(prompt=[True]), "prompt", "neither a text nor a list"),
    "large id": (with_fields(prompt=[264]), "prompt", "Token id 264"),
    "negative id": (with_fields(prompt=[-1]), "prompt", "Token id -1"),
    "huge id": (with_fields(prompt=[2**70]), "prompt", "Token id"),
    "too long": (with_fields(prompt="a" * 65), "prompt", "more than model.max_seq_length"),
    "many prompts": (with_fields(prompt=["a"] * 129), "prompt", "129 prompts"),
    "many choices": (with_fields(prompt=["a"] * 10, n=20), "n", "more than 128 choices"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
    "infinity": (b'{"prompt": "a", "top_p": 1e999}', "top_p", "finite"),
    "1e308": (with_fields(temperature=1e308), "temperature", "less than"),
    "1e-308": (with_fields(repetition_penalty=1e-308), "repetition_penalty", "greater than"),
    "text for a number": (with_fields(temperature="1"), "temperature", "valid number"),
    "truth for a number": (with_fields(temperature=True), "temperature", "valid number"),
    "fraction": (with_fields(max_tokens=1.5), "max_tokens", "valid integer"),
    "no tokens": (with_fields(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    "negative seed": (with_fields(seed=-1), "seed", "greater than or equal to 0"),
    "large seed": (with_fields(seed=2**63), "seed", "less than"),
    "n": (with_fields(n=0), "n", "greater than"),
    "logprobs": (with_fields(logprobs=21), "logprobs", "less than or equal to 20"),
    "min_tokens": (with_fields(min_tokens=3), "min_tokens", "above max_tokens"),
    "empty stop": (with_fields(stop=[""]), "stop.0", "at least 1 character"),
    "stop": (with_fields(stop=5), "stop", "valid string"),
    "many stops": (with_fields(stop=["a"] * 17), "stop", "at most 16"),
    "long stop": (with_fields(stop="a" * 2000), "stop", "at most 1024"),
    "stop token": (with_fields(stop_token_ids=[264]), "stop_token_ids", "outside"),
    "stream": (with_fields(stream="yes"), "stream", "valid boolean"),
    "stream options": (with_fields(stream_options={}), "stream_options", "needs stream"),
    "penalty": (with_fields(presence_penalty=1.0), "presence_penalty", "not supported"),
    "bias": (with_fields(logit_bias={"5": 1}), "logit_bias", "not supported"),
    "echo": (with_fields(echo=True, logprobs=1), "echo", "the prompt has no log probabilities"),
    "suffix": (with_fields(suffix="x"), "suffix", "not supported"),
    "unknown in ee": (with_fields(ee={"treshold": 1}), "ee.treshold", "is unknown"),
    "ee": (with_fields(ee=5), "ee", "valid dictionary"),
    "strategy": (with_fields(ee={"strategy": "fast"}), "ee.strategy", "'exact'"),
    "measure": (with_fields(ee={"measure": "luck"}), "ee.measure", "'max_probability'"),
    "measure only": (with_fields(ee={"measure": "margin"}), "ee.thresholds", "needs"),
    "gates": (
        with_fields(ee={"measure": "gate", "thresholds": 0.5}),
        "ee.measure",
        "needs a gate",
    ),
    "threshold": (with_fields(ee={"thresholds": 0}), "ee.thresholds", r"not in \(0, 1\]"),
    "thresholds": (with_fields(ee={"thresholds": {"1": 2}}), "ee.thresholds", "not in"),
    "file": (with_fields(ee={"thresholds": "/etc/passwd"}), "ee.thresholds", "'off'"),
    "no exit": (with_fields(ee={"thresholds": {"3": 0.5}}), "ee.thresholds", "not an exit"),
    "exit": (with_fields(ee={"thresholds": {"x": 0.5}}), "ee.thresholds.x", "pattern"),
    "draft": (with_fields(ee={"draft_exit": 1}), "ee.draft_exit", "no effect"),
    "draft exit": (
        with_fields(ee={"strategy": "self-speculative", "draft_exit": 3}),
        "ee.draft_exit",
        "not an exit",
    ),
    "draft length": (
        with_fields(ee={"strategy": "self-speculative", "draft_length": 0}),
        "ee.draft_length",
        "at least 1",
    ),
    "long draft": (
        with_fields(ee={"strategy": "self-speculative", "draft_length": 10_000}),
        "ee.draft_length",
        "must be below",
    ),
    "contrast": (
        with_fields(ee={"strategy": "dola", "thresholds": 0.5}),
        "ee.strategy",
        "all layers",
    ),
}

CHATS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no messages": ({}, "messages", "is missing"),
    "none": ({"messages": []}, "messages", "at least 1 item"),
    "text": ({"messages": "Hi"}, "messages", "valid list"),
    "message": ({"messages": ["Hi"]}, "messages.0", "valid dictionary"),
    "role": ({"messages": [{"content": "Hi"}]}, "messages", '"role"'),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "messages", '"content"'),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages",
        "Only text parts",
    ),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools", "not sup"),
    "format": (
        {
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {"type": "json_object"},
        },
        "response_format",
        "not supported",
    ),
    "top_logprobs": (
        {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
        "top_logprobs",
        "needs logprobs",
    ),
}


# Fields that change the output elsewhere, with values that do.
UNSUPPORTED: dict[str, Any] = {
    "use_beam_search": True,
    "length_penalty": 0.5,
    "guided_json": {"type": "object"},
    "guided_regex": "[0-9]",
    "guided_choice": ["yes", "no"],
    "guided_grammar": "root ::= x",
    "structured_outputs": {"regex": "[0-9]"},
    "allowed_token_ids": [5],
    "bad_words": ["a"],
    "prompt_logprobs": 0,
    "truncate_prompt_tokens": 1,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
}
UNSUPPORTED_CHAT: dict[str, Any] = {
    "reasoning_effort": "high",
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
}
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}


def check(response: httpx.Response, param: str | None, message: str) -> None:
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert message.replace("\\", "") in error["message"], error
    assert len(error["message"]) < 500


@pytest.mark.parametrize("case", COMPLETIONS)
def test_wrong_completions(server: Running, case: str) -> None:
    body, param, message = COMPLETIONS[case]
    check(server.post("/v1/completions", body), param, message)


@pytest.mark.parametrize("case", CHATS)
def test_wrong_chats(server: Running, case: str) -> None:
    body, param, message = CHATS[case]
    check(server.post("/v1/chat/completions", body), param, message)


def test_fields_that_change_the_output_elsewhere_are_refused(server: Running) -> None:
    for name, value in (UNSUPPORTED | {"add_special_tokens": False}).items():
        response = server.post("/v1/completions", with_fields(**{name: value}))
        check(response, name, f"{name} is not supported")
    for name, value in (UNSUPPORTED | UNSUPPORTED_CHAT).items():
        response = server.post("/v1/chat/completions", MESSAGES | {name: value})
        check(response, name, f"{name} is not supported")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": [{}]}, None),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
)
def test_wrong_tokens(server: Running, path: str, body: Any, param: str | None) -> None:
    check(server.post(path, body), param, "")


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me"},
        {"store": False},
        {"frequency_penalty": 0.0},
        {"use_beam_search": False, "length_penalty": 1.0, "bad_words": []},
        {"include_stop_str_in_output": False, "skip_special_tokens": True},
        {"add_special_tokens": True, **dict.fromkeys(UNSUPPORTED)},
    ],
)
def test_fields_without_an_effect_are_ignored(server: Running, fields: Any) -> None:
    assert server.post("/v1/completions", with_fields(**fields)).status_code == 200


def test_null_means_the_default(server: Running) -> None:
    names = (
        "temperature",
        "n",
        "stop",
        "seed",
        "logprobs",
        "echo",
        "stream",
        "top_k",
        "suffix",
        "ee",
    )
    assert server.post("/v1/completions", with_fields(**dict.fromkeys(names))).status_code == 200


def test_a_body_that_is_too_large(server: Running) -> None:
    large = with_fields(user="x" * 300_000)
    assert server.post("/v1/completions", large).status_code == 413
    parts = (large[start : start + 50_000] for start in range(0, len(large), 50_000))
    headers = {"content-type": "application/json"}  # without its length
    response = httpx.post(f"{server.url}/v1/completions", content=parts, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_a_body_that_is_not_declared_as_json(server: Running) -> None:
    """Browsers send such bodies from any page to a server on the same machine."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = server.post("/v1/completions", with_fields(), headers={"content-type": kind})
        assert response.status_code == 415
        assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_unknown_models_and_paths(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.completions.create(model="gpt-4", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")
    assert server.client.completions.create(model=NAME, prompt="a", max_tokens=1).model == NAME
    for response in (server.get("/v1/nothing"), server.get("/v1/completions")):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["message"]
