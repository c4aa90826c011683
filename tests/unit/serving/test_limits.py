"""Test the limits of a server: its queue, time, keys, clients that leave, and failures."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ee_llm.errors import RequestError, RunError
from ee_llm.inference.llm import LLM
from ee_llm.serving.api_keys import read_api_keys
from ee_llm.serving.async_engine import AsyncTokenStream
from ee_llm.serving.server import allowed_hosts, bind
from ee_llm.serving.service import ENGINE_FAILED
from ee_llm.serving.settings import ServerSettings
from tests.unit.serving.servers import NAME, Running, running, save, wait_for

# A request that runs until it is aborted: about a minute.
ENDLESS: dict[str, Any] = {"prompt": "a", "max_tokens": 30_000, "ignore_eos": True}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run"), max_seq_length=30_000)


@pytest.fixture(scope="module")
def llm(run: Path) -> Iterator[LLM]:
    with LLM(run, dtype="float32", max_num_seqs=2, cache_tokens=60_000) as llm:
        yield llm


def open_stream(server: Running, stack: ExitStack, **fields: Any) -> Iterator[str]:
    """Begin a stream that the stack closes, and return its remaining lines."""
    body = ENDLESS | {"stream": True} | fields
    response = stack.enter_context(
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60)
    )
    assert response.status_code == 200
    lines = response.iter_lines()
    stack.callback(lines.close)  # Without a reference to it, the connection would be closed.
    next(lines)
    return lines


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def test_a_full_queue_refuses_requests(llm: LLM) -> None:
    with running(llm, max_queued_requests=1) as server:
        with ExitStack() as stack:
            for _ in range(2):
                open_stream(server, stack)
            body = {"prompt": ["a", "b"], "max_tokens": 1}
            response = server.post("/v1/completions", body)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert error_of(response)["type"] == "rate_limit_error"
            assert "2 sequences are unfinished, of at most 3" in error_of(response)["message"]
            with pytest.raises(openai.RateLimitError):
                server.client.completions.create(model=NAME, prompt="a", n=2)
            assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
        server.wait_until_idle()
        assert server.post("/v1/completions", body).status_code == 200
        response = server.post("/v1/completions", {"prompt": "a", "n": 4})
        assert response.status_code == 400
        assert error_of(response)["param"] == "n"


def test_waiting_prompts_are_limited_by_their_tokens(llm: LLM) -> None:
    """By their size before they are encoded, then exactly; a request that is alone is served."""
    with running(llm, max_queued_tokens=100) as server:
        with ExitStack() as stack:
            for _ in range(2):
                open_stream(server, stack)
            waiting = threading.Thread(
                target=lambda: server.post("/v1/completions", {"prompt": "x" * 90, "max_tokens": 1})
            )
            waiting.start()
            wait_for(lambda: server.service.admission.num_tokens == 90)
            small = server.post("/v1/completions", {"prompt": "x" * 20})
            assert small.status_code == 429  # 20 tokens
            assert "90 prompt tokens are waiting, of at most 100" in error_of(small)["message"]
            early = server.post("/v1/completions", b"{" + b" " * 60 + b"!")
            assert early.status_code == 429  # It is refused before the body is parsed.
        waiting.join()
        alone = server.post("/v1/completions", {"prompt": "x" * 500, "max_tokens": 1})
        assert alone.status_code == 200
        server.wait_until_idle()


def test_a_long_prompt_that_waits_does_not_keep_others_out(llm: LLM) -> None:
    with running(llm, max_queued_tokens=100) as server, ThreadPoolExecutor() as pool:
        with ExitStack() as stack:
            for _ in range(2):
                open_stream(server, stack)
            admission = server.service.admission
            body = {"prompt": "x" * 500, "max_tokens": 1}
            long = pool.submit(server.post, "/v1/completions", body)
            wait_for(lambda: admission.num_sequences == 3)
            short = pool.submit(server.post, "/v1/completions", body | {"prompt": "x" * 40})
            wait_for(lambda: admission.num_sequences == 4 and admission.num_tokens == 90)
            second = server.post("/v1/completions", body)
            assert second.status_code == 429  # Only one that is alone may be that long.
        assert (long.result().status_code, short.result().status_code) == (200, 200)
        server.wait_until_idle()


def test_a_slow_upload_does_not_keep_others_out(llm: LLM) -> None:
    with running(llm, max_queued_tokens=100, max_body_mib=0.01) as server, ExitStack() as stack:
        url, admission = httpx.URL(server.url), server.service.admission
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n"

        def upload(number: int) -> None:
            client = stack.enter_context(socket.create_connection((url.host, url.port or 0)))
            client.sendall(head + b"Content-Type: application/json\r\n\r\n" + b" " * 9000)
            wait_for(lambda: admission.num_bytes == 9000 * number)

        upload(1)
        body = {"prompt": "x" * 50, "max_tokens": 1}
        assert server.post("/v1/completions", body).status_code == 200
        for number in range(2, 19):
            upload(number)
        refused = server.post("/v1/completions", b" " * 8000)  # Bytes that wait are limited, too.
        assert refused.status_code == 429
        assert "162000 bytes of other bodies" in error_of(refused)["message"]
        stack.close()
        server.wait_until_idle()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(llm: LLM, is_stream: bool) -> None:
    with running(llm) as server:
        if is_stream:
            with ExitStack() as stack:
                lines = open_stream(server, stack, n=2)
                next(lines)
                assert llm.engine.has_work
        else:
            with pytest.raises(httpx.ReadTimeout):
                server.post("/v1/completions", ENDLESS, timeout=0.5)
        server.wait_until_idle()


def test_a_client_that_leaves_the_queue_is_noticed(llm: LLM) -> None:
    with running(llm) as server:
        with ExitStack() as stack:
            for _ in range(2):
                open_stream(server, stack)
            for is_stream in (False, True):
                body = ENDLESS | {"stream": is_stream}
                with pytest.raises(httpx.ReadTimeout):
                    server.post("/v1/completions", body, timeout=0.5)
            wait_for(lambda: server.service.admission.num_sequences == 2)
            wait_for(lambda: len(llm.engine.scheduler.waiting) == 0)
        server.wait_until_idle()


def test_a_request_that_takes_too_long_is_aborted(llm: LLM) -> None:
    with running(llm, request_timeout_s=0.4) as server:
        response = server.post("/v1/completions", ENDLESS, timeout=30)
        assert response.status_code == 504
        assert "aborted after 0.4 s" in error_of(response)["message"]
        with pytest.raises(openai.APIError, match="aborted after 0.4 s"):
            for _ in server.client.completions.create(
                model=NAME,
                prompt="a",
                max_tokens=30_000,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                pass
        server.wait_until_idle()


def test_a_body_that_does_not_come(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with running(llm, body_timeout_s=1) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        for leaves in (True, False):
            url = httpx.URL(server.url)
            with socket.create_connection((url.host, url.port or 0)) as client:
                client.sendall(head + b"Content-Type: application/json\r\n\r\n{")
                wait_for(lambda: server.service.admission.num_requests == 1)
                if not leaves:
                    answer = b""
                    while b"not complete after 1 s" not in answer:
                        answer += client.recv(2**16)
                    assert answer.startswith(b"HTTP/1.1 408 ")
            server.wait_until_idle()
    assert "Traceback" not in caplog.text


def test_a_slow_reader_is_aborted(llm: LLM) -> None:
    with running(llm, max_unread_tokens=50, send_buffer=4096) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = httpx.URL(server.url)
        client.connect((url.host, url.port))
        body = json.dumps(ENDLESS | {"stream": True, "logprobs": 20})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}"
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        wait_for(lambda: llm.engine.has_work)
        wait_for(lambda: not llm.engine.has_work)  # The client reads nothing.
        admission = server.service.admission
        wait_for(lambda: (admission.num_sequences, admission.num_tokens) == (0, 0), 5)
        assert admission.num_requests == 1
        received = b""
        while b"of its tokens were unread, more than" not in received:
            received += client.recv(2**16)
        assert received.count(b"data: ") < 5000
        client.shutdown(socket.SHUT_WR)


def test_a_finished_stream_that_nobody_reads_has_no_place(llm: LLM) -> None:
    fields = {"max_tokens": 60, "n": 3, "stream": True, "logprobs": 20}
    body = json.dumps(ENDLESS | fields | {"prompt": "a" * 200})
    with running(llm, send_buffer=4096) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url, admission = httpx.URL(server.url), server.service.admission
        client.connect((url.host, url.port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}"
        client.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        wait_for(lambda: admission.num_sequences == 3)
        wait_for(lambda: not llm.engine.has_work)
        wait_for(lambda: (admission.num_sequences, admission.num_tokens) == (0, 0), 5)
        assert admission.num_requests == 1
        received = b""
        while b"[DONE]" not in received:
            received += client.recv(2**16)
        assert received.count(b'"finish_reason":"length"') == 3
        client.shutdown(socket.SHUT_WR)
        server.wait_until_idle()


def test_keys(llm: LLM) -> None:
    keys = ("first-key-of-the-test", "second-key-of-the-test")
    with running(llm, api_keys=keys) as server:
        body = {"prompt": "a", "max_tokens": 1}
        for value in ("", "Bearer wrong", f"Basic {keys[0]}", keys[0], "Bearer \xe9"):
            headers = {"authorization": value.encode("latin-1")} if value else {}
            response = server.post("/v1/completions", body, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "invalid_api_key"
            assert "x-request-id" in response.headers
        for path in ("/v1/models", "/version", "/openapi.json", "/nowhere"):
            assert server.get(path).status_code == 401
        for path in ("/health", "/live", "/ready"):
            assert server.get(path).status_code == 200
        for key in keys:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key)
            assert client.completions.create(model=NAME, prompt="a", max_tokens=1).choices


def test_a_page_of_another_host_cannot_use_a_local_server(llm: LLM) -> None:
    """A name that an attacker lets mean 127.0.0.1; with keys, a page has none to send."""
    body = {"prompt": "a", "max_tokens": 1}
    with running(llm) as server:
        for host in ("page.example", "page.example:8000", "localhost.page.example", "[::2]:1", ""):
            for response in (
                server.post("/v1/completions", body, headers={"host": host}),
                server.get("/health", headers={"host": host}),
            ):
                assert response.status_code == 403
                assert error_of(response)["type"] == "permission_error"
                assert "x-request-id" in response.headers
        for host in ("localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]", "[::1]:8000"):
            assert server.get("/v1/models", headers={"host": host}).status_code == 200
    with running(llm, api_keys=("a-key-of-the-test",)) as server:
        assert server.get("/health", headers={"host": "page.example"}).status_code == 200


def test_the_hosts_of_a_server() -> None:
    settings = ServerSettings(model_name="a")
    with bind("127.0.0.1", 0) as bound:
        assert allowed_hosts(bound, "my-machine", settings)[-1] == "my-machine"
        assert allowed_hosts(bound, "::1", settings)[-1] == "[::1]"
    with bind("0.0.0.0", 0) as bound:
        assert allowed_hosts(bound, "0.0.0.0", settings) == ()


def test_the_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  0123456789abcdef  \nfedcba9876543210\n")
    assert read_api_keys(path) == ("0123456789abcdef", "fedcba9876543210")
    for text, message in {
        "": "has no key",
        "# only\n": "has no key",
        "short\n": "line 1: a key must have at least 16",
        "0123456789 abcdef": "line 1: a key must",
    }.items():
        path.write_text(text)
        with pytest.raises(RequestError, match=message) as caught:
            read_api_keys(path)
        assert "short" not in str(caught.value).replace("shorter", "")
    path.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="UTF-8"):
        read_api_keys(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_api_keys(tmp_path / "none")


@pytest.mark.parametrize("kind", [ValueError, RunError])
def test_a_failure_of_the_engine_ends_all_requests(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    """Clients get no internal text; probes need no key, so they tell even less."""
    with running(llm) as server, ExitStack() as stack:
        assert server.get("/health").json() == {"status": "ok"}
        failure = kind("broken")
        lines = open_stream(server, stack)

        def fail() -> None:
            raise failure

        monkeypatch.setattr(llm.engine, "_advance", fail)
        last = [line for line in lines if line][-1]
        assert '"type": "server_error"' in last
        assert "The engine has failed; the server's log has the reason." in last
        assert "broken" not in last
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 500
        assert error_of(response)["message"] == ENGINE_FAILED
        for path in ("/health", "/ready"):
            assert server.get(path).status_code == 503
            assert server.get(path).json() == {"status": "failed"}
        assert server.get("/live").status_code == 200
        assert len([r for r in caplog.records if "engine failed" in r.getMessage()]) == 1
        assert "broken" in caplog.text


def test_a_failure_to_read_a_choice_does_not_tell_about_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: AsyncTokenStream, step: Any) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(AsyncTokenStream, "_take", fail)
    with running(llm) as server:
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status_code == 500
        assert error_of(response)["message"] == ENGINE_FAILED
        assert caplog.text.count("ValueError: /secret/path") == 1
        server.wait_until_idle()


def test_a_hanging_step_is_reported(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    advance = llm.engine._advance
    monkeypatch.setattr(llm.engine, "_advance", lambda: release.wait(60) and advance())
    with running(llm, stall_timeout_s=0.2) as server:
        assert server.get("/ready").status_code == 200
        thread = threading.Thread(
            target=lambda: server.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
        )
        thread.start()
        wait_for(lambda: server.get("/ready").status_code == 503)
        assert server.get("/health").json()["status"] == "stalled"
        assert caplog.text.count("step has been running") == 1
        release.set()
        thread.join()
        assert server.get("/ready").status_code == 200


def test_an_error_of_the_server_does_not_tell_about_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(llm) as server:
        monkeypatch.setattr(server.service, "encode", lambda *_: 1 / 0)
        response = server.post("/v1/completions", {"prompt": "secret"})
        assert response.status_code == 500
        id = response.headers["x-request-id"]
        message = f"The server has failed. Its log has the reason, under {id}."
        assert error_of(response)["message"] == message
        wait_for(lambda: "ZeroDivisionError" in caplog.text)
        assert id in caplog.text
        assert "secret" not in caplog.text
        server.wait_until_idle()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": ""}, "model_name is empty"),
        ({"max_queued_requests": 0}, "max_queued_requests = 0"),
        ({"max_queued_tokens": 1.5}, "max_queued_tokens = 1.5"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s = nan"),
        ({"max_body_mib": -1}, "max_body_mib = -1"),
    ],
)
def test_wrong_settings(settings: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ServerSettings(**{"model_name": "a"} | settings)
