"""Test `ee-llm serve` as a process: its start, its signals and its errors."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ee_llm.cli import main
from ee_llm.cli.serve import COMMAND, ServeOptions, run_serve
from ee_llm.errors import UserError
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.serving.service import ENGINE_FAILED
from tests.unit.serving.servers import save, save_template, wait_for

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save(folder, max_seq_length=30_000)
    return folder


@contextmanager
def serving(
    run: Path, *options: str, shown: str = "", code: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command while the context lasts; yields its process and URL.

    Args:
        run: The checkpoint.
        options: Options of the command.
        shown: Part of the line at the start.
        code: Python code to run instead of the command.
    """
    start = ["-c", code] if code else ["-m", "ee_llm"]
    command = [sys.executable, *start, "serve", str(run), "--port", "0"]
    with subprocess.Popen(
        [*command, "--dtype", "float32", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"Serving (\S+) at (http://127\.0\.0\.1:\d+)/v1 ", line)
            assert found, line + (process.stderr.read() if process.stderr else "")
            assert found[1] == run.name
            assert shown in line
            yield process, found[2]
        finally:
            process.kill()


@contextmanager
def stream(url: str, max_tokens: int) -> Iterator[Iterator[str]]:
    """Begin a stream, and yield its lines after the first."""
    body = {"prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


def wait_until_draining(process: subprocess.Popen[str], url: str, number: int) -> None:
    assert httpx.get(f"{url}/ready").status_code == 200
    process.send_signal(number)
    wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)


def log_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.read()


def test_sigterm_finishes_running_requests(run: Path) -> None:
    options = ("--thresholds", "0.5", "off", "--drain-timeout-s", "100", "--no-page")
    with serving(run, *options) as (process, url), stream(url, 500) as lines:
        assert httpx.get(url).status_code == 404
        wait_until_draining(process, url, signal.SIGTERM)
        assert httpx.get(f"{url}/live").status_code == 200
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "b"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "shutting_down"
        *chunks, last = lines
        assert last == "data: [DONE]"
        assert len(chunks) == 499
        assert process.wait(30) == 0
        log = log_of(process)
        assert "Stopping: 1 sequences are finished first, for at most 100 s" in log
        assert "1 prompt tokens, 500 generated" in log


def test_a_second_signal_aborts_running_requests(run: Path) -> None:
    with serving(run) as (process, url), stream(url, 30_000) as lines:
        assert "page/page.js" in httpx.get(url).text
        wait_until_draining(process, url, signal.SIGINT)
        time.sleep(1.2)  # A repetition within a second counts as the same signal.
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        with suppress(httpx.RemoteProtocolError):
            assert "data: [DONE]" not in list(lines)


def test_the_time_to_drain_is_limited(run: Path) -> None:
    with serving(run, "--drain-timeout-s", "0.2") as (process, url):
        with stream(url, 30_000) as lines:
            process.send_signal(signal.SIGTERM)
            *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["message"], error["code"]) == ("The engine was closed.", "shutting_down")
        assert process.wait(30) == 0
        assert "The time to finish requests is over" in log_of(process)


# Runs the command with an engine whose fourth step hangs, or fails after the first signal.
_TROUBLE = """
import sys, time
from ee_llm.inference import engine_base
from ee_llm.serving import server
from ee_llm.cli.main import main

step, count = engine_base.EngineBase.step, [0]
handle = server._Server.handle_exit
signals = []
server._Server.handle_exit = lambda self, *a: (signals.append(1), handle(self, *a))

def broken(self):
    count[0] += 1
    if count[0] > 3:
        while KIND == "hangs" or not signals:
            time.sleep(0.05)
        raise ValueError("broken")
    return step(self)

engine_base.EngineBase.step = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("drain", ["100", "0.2"])
def test_a_hanging_step_does_not_keep_the_server_from_ending(run: Path, drain: str) -> None:
    """After a second signal, before the engine is closed or meanwhile."""
    code = _TROUBLE.replace("KIND", "'hangs'")
    with (
        serving(run, "--drain-timeout-s", drain, code=code) as (process, url),
        suppress(httpx.HTTPError),
        stream(url, 30_000),
    ):
        wait_until_draining(process, url, signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
        assert "The engine's step has not ended" in log_of(process)


def test_a_failure_while_requests_are_finished(run: Path) -> None:
    code = _TROUBLE.replace("KIND", "'fails'")
    with serving(run, code=code) as (process, url), stream(url, 30_000) as lines:
        process.send_signal(signal.SIGTERM)
        *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == ENGINE_FAILED
        assert process.wait(30) == 1
        assert log_of(process).count("ValueError: broken") == 1


def test_several_ranks_serve_until_one_is_lost(run: Path) -> None:
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0, "ee": {"thresholds": 0.2}}
    with serving(run, "--pipeline", "2") as (process, url):
        response = httpx.post(f"{url}/v1/completions", json=body)
        with LLM(run, dtype="float32") as llm:
            (expected,) = llm.generate("Once", SamplingParams(max_tokens=8), exits=0.2)
        assert response.json()["choices"][0]["text"] == expected.text
        with stream(url, 30_000) as lines:
            (worker,) = psutil.Process(process.pid).children()
            worker.kill()
            *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_error"
        assert error["message"] == ENGINE_FAILED
        assert process.wait(60) == 1
        log = log_of(process)
        assert log.count("Rank 1 of the engine ended: killed by signal 9") == 1
        assert log.endswith("The engine has failed. The log above has the reason.\n")


def test_limits_are_in_force_when_the_server_starts(run: Path, tmp_path: Path) -> None:
    limits, log = tmp_path / "limits.json", tmp_path / "audit.jsonl"
    limits.write_text('{"min_thresholds": 0.95}')
    options = ("--limits", str(limits), "--audit-log", str(log))
    with serving(run, *options, shown="exits {1: 0.95, 2: 0.95}") as (process, url):
        body = {"prompt": "a", "max_tokens": 1, "ee": {"thresholds": 0.1}}
        (choice,) = httpx.post(f"{url}/v1/completions", json=body).json()["choices"]
        assert [one["effective"] for one in choice["ee"]["clamped"]] == [0.95, 0.95]
        assert 'ee_llm:clamps_total{kind="thresholds"' in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "threshold of exit 1 0.8 -> 0.95" in log_of(process)
    assert json.loads(log.read_text())["event"] == "clamp"


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.main(["serve", str(run), "--port", str(port)]) == 2
    assert f"--port {port} cannot be used: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 is not an address"),
        (["--max-queued-requests", "0"], "--max-queued-requests 0 is out of range"),
        (["--request-timeout-s", "nan"], "--request-timeout-s nan is out of range"),
        (["--policy", "p.json", "--thresholds", "0.5"], "--thresholds are both given"),
        (["--policy", "none.json"], "Policy file none.json cannot be read"),
        (["--thresholds", "0.5", "0.6", "0.7"], "thresholds: 3 given for 2 exits"),
        (["--api-key-file", "none.txt"], "none.txt cannot be read"),
        (["--limits", "none.json"], "--limits none.json cannot be read"),
        (["--audit-log", "a.jsonl"], "--audit-log has no effect without --limits"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0 is out of range"),
    ],
)
def test_wrong_options(run: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run_serve([str(run), "--port", "0", *options])


def test_a_missing_extra_is_an_error_that_says_how_to_install_it(run: Path) -> None:
    """The command does not import its server before."""
    code = (
        "import sys; sys.modules['uvicorn'] = None; from ee_llm.cli.main import main;"
        f"sys.exit(main(['serve', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "ee-llm serve needs uvicorn" in done.stderr
    assert "pip install 'ee-llm[serve]'" in done.stderr


def test_help_shows_every_option_in_a_group() -> None:
    named = " ".join(f"{group.common} {group.advanced}" for group in COMMAND.groups).split()
    fields: dict[str, Any] = ServeOptions.__dataclass_fields__
    assert sorted(named) == sorted(fields.keys() - {"checkpoint"})


def blocks(language: str) -> list[str]:
    page = (Path(__file__).resolve().parents[3] / "docs" / "how-to" / "serve.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_examples_of_the_guide(run: Path) -> None:
    """The commands of curl are sent by httpx, since not every machine has curl."""
    client, asynchronous = blocks("python")
    with serving(run, "--chat-template", str(save_template(run))) as (process, url):
        (commands,) = blocks("bash")
        for command in commands.splitlines():
            words = shlex.split(command)
            path = words[1].removeprefix("http://127.0.0.1:8000")
            assert words[0] == "curl"
            options = dict(zip(words[2::2], words[3::2], strict=True))
            kind = options.get("-H", ": ").split(": ")[1]
            response = httpx.request(
                "POST" if "-d" in options else "GET",
                f"{url}{path}",
                content=options.get("-d"),
                headers={"content-type": kind},
            )
            assert response.status_code == 200, response.text
        exec(client.replace("http://127.0.0.1:8000", url), {})
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    exec(asynchronous.replace("runs/tuned", str(run)), {"__name__": "example"})
