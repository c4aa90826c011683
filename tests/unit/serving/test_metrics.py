"""Test `/metrics` of a server against what its requests have done."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.serving.servers import NAME, Running, running, save, wait_for

BODY = {"prompt": "Once", "max_tokens": 12, "temperature": 0}
EXITS = {1: 0.2, 2: 0.3}
POLICY = {"thresholds": {"1": 0.2, "2": 0.3}}
REFUSE = {"on_violation": "refuse"}
DRAFTS = {"strategy": "self-speculative", "draft_exit": 2, "draft_length": 3}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    run = save(tmp_path_factory.mktemp("run"), max_seq_length=30_000)
    with LLM(run, dtype="float64", max_num_seqs=1, cache_tokens=60_000) as llm:
        yield llm


def read(server: Running) -> dict[str, float]:
    """Return the samples by their name and the values of their labels."""
    response = server.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            own = dict(sample.labels)
            assert own.pop("model_name") == NAME
            name = sample.name.removeprefix("ee_llm:")
            assert name != sample.name
            found[" ".join([name, *own.values()])] = sample.value
    return found


def test_metrics_count_tokens_times_and_depths(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    (early,) = llm.generate("Once", params, exits=EXITS)
    (full,) = llm.generate("Once", params, strategy="full")
    assert len(set(early.exits)) > 1
    with running(llm) as server:
        before = read(server)
        assert before["generation_tokens_total"] == before["exit_depth_count"] == 0
        assert before["request_success_total abort"] == 0
        server.post("/v1/completions", BODY | {"ee": POLICY})
        server.post("/v1/completions", BODY | {"ee": {"strategy": "full"}, "stream": True})
        server.wait_until_idle()
        found = read(server)
    exits = [*early.exits, *full.exits]
    assert found["prompt_tokens_total"] == 8
    assert found["generation_tokens_total"] == len(exits) == found["exit_depth_count"]
    assert found["exit_depth_sum"] == sum(exits)
    for boundary in (1, 2):
        count = sum(exit <= boundary for exit in exits)
        assert found[f"exit_depth_bucket {boundary}.0"] == count
    assert found["time_to_first_token_seconds_count"] == 2
    assert found["inter_token_latency_seconds_count"] == len(exits) - 2
    assert found["e2e_request_latency_seconds_count"] == 2
    reasons = {"eos": "stop", "length": "length"}
    for one in {early.finish_reason, full.finish_reason}:
        expected = sum(output.finish_reason == one for output in (early, full))
        assert found[f"request_success_total {reasons[one]}"] == expected
    assert found["request_success_total abort"] == 0
    assert not any("created" in name for name in found)
    seconds = found["time_to_first_token_seconds_sum"] + found["inter_token_latency_seconds_sum"]
    assert 0 < seconds == pytest.approx(found["e2e_request_latency_seconds_sum"])
    gauges = ("num_requests_running", "num_requests_waiting")
    assert [found[one] for one in gauges] == [0, 0]


def test_metrics_of_drafts(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    with running(llm) as server:
        server.post("/v1/completions", BODY | {"ee": DRAFTS})
        server.wait_until_idle()
        found = read(server)
        drafts = SelfSpeculation(draft_exit=2, draft_length=3)
        (expected,) = llm.generate("Once", params, strategy=drafts)
    assert expected.num_drafted > 0
    assert found["spec_decode_num_draft_tokens_total"] == expected.num_drafted
    assert found["spec_decode_num_accepted_tokens_total"] == expected.num_accepted
    assert found["generation_tokens_total"] == len(expected.token_ids)
    steps = found["inter_token_latency_seconds_count"] + 1
    assert steps < len(expected.token_ids)  # A step may bring several tokens.


def test_metrics_of_a_busy_server(llm: LLM) -> None:
    endless = BODY | {"max_tokens": 29_000, "ignore_eos": True, "stream": True}
    with running(llm) as server:
        with ExitStack() as stack:
            for number in range(2):
                stack.enter_context(
                    httpx.stream("POST", f"{server.url}/v1/completions", json=endless)
                )
                wait_for(lambda number=number: len(llm.engine.scheduler.waiting) == number)
                wait_for(lambda: llm.engine.scheduler.running)
            found = read(server)
            assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 1)
            assert 0 < found["kv_cache_usage_perc"] < 1
        server.wait_until_idle()
        found = read(server)
        assert found["request_success_total abort"] == 2
        assert found["num_requests_running"] == found["kv_cache_usage_perc"] == 0
        assert found["e2e_request_latency_seconds_count"] == 0


def test_metrics_of_limits(llm: LLM, tmp_path: Path) -> None:
    """With an audit log on a disk that is full."""
    path = tmp_path / "limits.json"
    limits = {"min_thresholds": {"1": 0.5, "2": 0.1}, "allowed_strategies": ["exact"]}
    path.write_text(json.dumps(limits))
    with running(llm, limits=path, audit_log=Path("/dev/full")) as server:
        for ee in (POLICY, POLICY, {"strategy": "sled"}):
            assert server.post("/v1/completions", BODY | {"ee": ee}).status_code == 200
        found = read(server)
    assert {name: one for name, one in found.items() if name.startswith("clamps")} == {
        "clamps_total strategy": 1,
        "clamps_total measure": 0,
        "clamps_total thresholds": 2,
        "clamps_total draft_exit": 0,
        "clamps_total draft_threshold": 0,
    }
    assert (found["refusals_total"], found["audit_errors_total"]) == (0, 3)
    path.write_text(json.dumps({"allowed_measures": ["entropy", "max_probability"]} | REFUSE))
    with running(llm, limits=path) as server:
        ee = POLICY | {"measure": "margin"}
        assert server.post("/v1/completions", BODY | {"ee": ee}).status_code == 400
        assert read(server)["refusals_total"] == 1


def test_servers_count_for_themselves(llm: LLM) -> None:
    """With one registry for the process, the second one could not start."""
    for _ in range(2):
        with running(llm) as server:
            server.post("/v1/completions", BODY | {"max_tokens": 1})
            assert read(server)["generation_tokens_total"] == 1


def test_metrics_need_a_key_if_there_are_keys(llm: LLM) -> None:
    key = "a-key-of-this-test-server"
    with running(llm, api_keys=(key,)) as server:
        assert server.get("/metrics").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert server.get("/metrics", headers=headers).status_code == 200


def test_scrapers_may_ask_for_openmetrics(llm: LLM) -> None:
    with running(llm) as server:
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        response = server.get("/metrics", headers=accept)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")
