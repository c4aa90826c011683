"""Test a server with the operator's limits: its outputs, its responses and its audit log."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from tests.unit.serving.servers import Running, running, save

KEY = "a-key-of-this-test-server"
HEADERS = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
FIELDS = {"max_tokens": 8, "temperature": 0}
COMPLETION = {"prompt": "secret", **FIELDS}
CHAT = {"messages": [{"role": "user", "content": "secret"}], **FIELDS}
ENDPOINTS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
LOW = {"thresholds": {"1": 0.01, "2": 0.3}}
CLAMPED = [{"param": "ee.thresholds", "exit": 1, "asked": 0.01, "effective": 0.2}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("run")
    template = folder / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    run = save(folder / "run")
    with LLM(run, dtype="float64", exits={1: 0.001, 2: 0.3}, chat_template=template) as llm:
        yield llm


def limited(llm: LLM, folder: Path, **limits: Any) -> Any:
    path = folder / "limits.json"
    path.write_text(json.dumps({"min_thresholds": 0.2} | limits))
    return running(llm, limits=path, audit_log=folder / "audit.jsonl", api_keys=(KEY,))


def post(server: Running, path: str, **fields: Any) -> Any:
    return server.post(path, ENDPOINTS[path] | fields, headers=HEADERS)


def chunks(server: Running, path: str, **fields: Any) -> list[Any]:
    *lines, _ = post(server, path, stream=True, **fields).text.split("\n\n")[:-1]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]


def audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_thresholds_are_clamped(llm: LLM, tmp_path: Path, path: str) -> None:
    params = SamplingParams(max_tokens=8)
    (low,) = llm.generate("secret", params, exits={1: 0.01, 2: 0.3})
    (expected,) = llm.generate("secret", params, exits={1: 0.2, 2: 0.3})
    assert low.text != expected.text
    with limited(llm, tmp_path) as server:
        ee = LOW | {"return_exits": True}
        (choice,) = post(server, path, ee=ee).json()["choices"]
        assert choice["ee"]["exits"] == list(expected.exits)
        assert choice["ee"]["digest"] == expected.policy.digest
        assert choice["ee"]["clamped"] == CLAMPED
        *_, last = chunks(server, path, ee=ee)
        assert (last["ee"]["clamped"], last["ee"]["exits"]) == (CLAMPED, [expected.exits[-1]])
        # Without return_exits, a response says what was changed, and nothing else.
        (choice,) = post(server, path, ee=LOW).json()["choices"]
        assert choice["ee"] == {"clamped": CLAMPED}
        *others, last = chunks(server, path, ee=LOW)
        assert last["ee"] == {"clamped": CLAMPED}
        assert not any("ee" in one for one in others)
        # The server's own policy is raised too, which nobody has asked for.
        (choice,) = post(server, path, ee={"return_exits": True}).json()["choices"]
        assert choice["ee"]["policy"]["thresholds"] == {"1": 0.2, "2": 0.3}
        assert "clamped" not in choice["ee"]
        (choice,) = post(server, path).json()["choices"]
        assert "ee" not in choice
        assert server.service.gatekeeper.num_clamps == {"thresholds": 4}
    lines = audit(tmp_path)
    assert len(lines) == 4
    assert {name: lines[2][name] for name in lines[2] if name != "time"} == {
        "event": "clamp",
        "request_id": "mine",
        "key_id": hashlib.sha256(KEY.encode()).hexdigest()[:16],
        "asked": LOW,
        "effective": {
            "strategy": "exact",
            "measure": "max_probability",
            "thresholds": {"1": 0.2, "2": 0.3},
            "digest": ExitPolicy((1, 2), (0.2, 0.3)).digest,
        },
        "clamped": CLAMPED,
    }
    text = (tmp_path / "audit.jsonl").read_text()
    assert "secret" not in text
    assert KEY not in text


def test_requests_are_refused(llm: LLM, tmp_path: Path) -> None:
    with limited(llm, tmp_path, min_thresholds=0.001, on_violation="refuse") as server:
        ee: dict[str, Any] = {"thresholds": 0.0001}
        for path in ENDPOINTS:
            for stream in (False, True):
                response = post(server, path, ee=ee, stream=stream)
                assert response.status_code == 400
                error = response.json()["error"]
                assert (error["param"], error["code"]) == ("ee.thresholds", "operator_limit")
                assert "is below 0.001, the least that the operator" in error["message"]
        assert post(server, "/v1/completions").status_code == 200
        server.wait_until_idle()
    lines = audit(tmp_path)
    assert [(one["event"], one["effective"]) for one in lines] == [("refuse", None)] * 4
    assert lines[0]["asked"] == ee
    assert "is below 0.001" in lines[0]["reason"]


@pytest.mark.parametrize("strategy", ["full", "self-speculative", "propagate", "sled", "dola"])
def test_strategies_work_within_limits(llm: LLM, tmp_path: Path, strategy: str) -> None:
    with limited(llm, tmp_path) as server:
        ee = {"strategy": strategy, "return_exits": True}
        (choice,) = post(server, "/v1/completions", ee=ee).json()["choices"]
        assert choice["ee"]["strategy"] == strategy
        options: Any = {"exits": {1: 0.2, 2: 0.3}} if strategy == "propagate" else {}
        (expected,) = llm.generate(
            "secret", SamplingParams(max_tokens=8), strategy=strategy, **options
        )
        assert choice["text"] == expected.text
