"""`ee-llm generate` over ranks in separate processes: its output, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ee_llm import distributed
from ee_llm.cli import generate as generate_command
from ee_llm.cli import main
from ee_llm.cli.generation.command import generate
from ee_llm.cli.generation.options import GenerateOptions
from tests.unit.inference.models import random_tensors, save_model, tiny_config

CONFIG = tiny_config("llama", vocab_size=264, max_seq_length=48)
LONG = tiny_config("llama", vocab_size=264, max_seq_length=8192)
LAYOUTS = {
    "pipeline 2": ("--pipeline", "2"),
    "tensor 2": ("--tensor", "2"),
    "tensor 2 pipeline 2": ("--tensor", "2", "--pipeline", "2"),
}
LINES = [
    {"prompt": f"prompt {number}", "strategy": strategy, "id": f"{number}{strategy}"}
    for number, strategy in enumerate(("exact", "full", "self-speculative", "propagate") * 2)
]
LINES[4] |= {"temperature": 0.8, "repetition_penalty": 1.2, "seed": 5, "max_tokens": 35}
LINES[6] |= {"temperature": 0.8, "top_k": 9, "draft_exit": 2, "stop": ["e", "t"]}
Record = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a directory with two models, a batch, and the results of one process."""
    path = tmp_path_factory.mktemp("place")
    save_model(path / "run", CONFIG, random_tensors(CONFIG, dtype=torch.float32))
    endless = random_tensors(LONG, dtype=torch.float32)
    endless["output.weight"][256] = 0  # end-of-sequence is never the most probable token
    save_model(path / "long", LONG, endless)
    (path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    generate(
        GenerateOptions(
            path / "run",
            batch_file=path / "batch.jsonl",
            output=path / "single.jsonl",
            thresholds=(0.3,),
            max_tokens=20,
            dtype="float64",
        )
    )
    return path


@contextmanager
def started(place: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command; at the end, kill it and its ranks."""
    with subprocess.Popen(
        [sys.executable, "-m", "ee_llm", *arguments],
        cwd=place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for pid in (process.pid, *_children(process)):  # each rank has its own session
                    os.kill(pid, signal.SIGKILL)


def _children(launcher: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
    )
    return [int(pid) for pid in listed.stdout.split()]


def _ranks(launcher: subprocess.Popen[str], count: int) -> list[int]:
    ranks = _children(launcher)
    assert len(ranks) == count
    return ranks


def run(place: Path, *arguments: str, status: int = 0, stdin: str = "") -> tuple[str, str]:
    with started(place, "generate", *arguments) as process:
        out, err = process.communicate(stdin, timeout=120)
    assert process.returncode == status, err
    return out, err


def records(path: Path) -> dict[str, Record]:
    return {one["id"]: one for one in map(json.loads, path.read_text().splitlines())}


def assert_equal(found: Record, expected: Record) -> None:
    """Assert equality up to rounding of sums over ranks, and the numbers of drafts."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("confidences", "logprobs"):
            assert found[name] == pytest.approx(value, abs=1e-9)
        elif name not in ("num_drafted", "num_accepted"):
            assert found[name] == value, name


OPTIONS = ("--checkpoint", "run", "--thresholds", "0.3", "--max-tokens", "20")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_equals_that_of_one_process(place: Path, tmp_path: Path, layout: str) -> None:
    """All strategies, sampled and greedy, in float64; the certificate passes as well."""
    output = tmp_path / "out.jsonl"
    batch = ("--batch-file", "batch.jsonl", "--output", str(output), "--max-num-seqs", "3")
    _, err = run(place, *OPTIONS, *LAYOUTS[layout], *batch, "--dtype", "float64", "--verify")
    found, single = records(output), records(place / "single.jsonl")
    assert found.keys() == single.keys()
    for id, record in single.items():
        assert_equal(found[id], record)
    assert {exit for one in found.values() for exit in one["exits"]} == {1, 2, 4}
    *lines, certificate = err.splitlines()
    assert any(line.startswith("8 prompts, 0 of them from an earlier run") for line in lines)
    assert any(line.startswith("self-speculation: ") for line in lines)
    assert certificate.startswith("certificate: 8 generations")
    assert ", 0 divergences," in certificate


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompt_from_standard_input_is_one_json_object(place: Path, layout: str) -> None:
    """Only the first rank reads and prints."""
    out, err = run(
        place, *OPTIONS, *LAYOUTS[layout], "--dtype", "float64", "--json", stdin="prompt 0"
    )
    single = records(place / "single.jsonl")["0exact"]
    found = json.loads(out)
    assert len(found.pop("pieces")) == len(found["token_ids"])
    assert found.pop("speed")["tokens_per_second"] > 0
    assert_equal(found | {"id": "0exact"}, single)
    assert err == ""


SLOW_BUT_TWO_STAGES = [
    pytest.param(layout, marks=[] if layout == "pipeline 2" else pytest.mark.slow)
    for layout in LAYOUTS
]


@pytest.mark.parametrize("layout", SLOW_BUT_TWO_STAGES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x" * 49), "The prompt has 49 tokens, more than model.max_seq_length = 48"),
        (("--prompt", "a", "--temperature", "-1"), "temperature = -1.0"),
        (("--prompt-file", "none"), "--prompt-file none "),
        (
            ("--batch-file", "bad.jsonl", "--output", "never.jsonl"),
            "--batch-file bad.jsonl, line 2 ",
        ),
        (
            ("--batch-file", "batch.jsonl", "--output", "batch.jsonl"),
            "--output batch.jsonl, line 1: 'prompt_token_ids' is missing",
        ),
    ],
    ids=["prompt too long", "bad option", "no file", "bad line", "foreign output"],
)
def test_error_is_one_line(
    place: Path, layout: str, arguments: tuple[str, ...], message: str
) -> None:
    """Two or four processes could print an error, and waiting threads could abort."""
    (place / "bad.jsonl").write_text(json.dumps(LINES[0]) + '\n{"prompt": "cut')
    out, err = run(place, *OPTIONS, *LAYOUTS[layout], *arguments, status=2)
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"ee-llm: {message}")
    assert not (place / "never.jsonl").exists()


def test_invalid_line_is_an_error_record(place: Path, tmp_path: Path) -> None:
    """The ranks end in order before rank 0 reports it, and the other records are written."""
    (place / "long.jsonl").write_text(json.dumps(LINES[0]) + "\n" + '{"prompt": "%s"}' % ("x" * 49))
    output = tmp_path / "out.jsonl"
    batch = ("--batch-file", "long.jsonl", "--output", str(output))
    _, err = run(place, *OPTIONS, *LAYOUTS["pipeline 2"], *batch, status=1)
    said = err.splitlines()[-1]
    assert said.startswith(f"ee-llm: 1 of 2 prompts failed; --output {output} has an error record")
    assert "line 2: The prompt has 49 tokens" in said
    found = records(output)
    assert "49 tokens, more than" in found["2"]["error"]["message"]
    assert len(found["0exact"]["token_ids"]) == 20


def test_same_error_of_all_ranks_is_one_line(place: Path) -> None:
    """The error occurs on every rank after the ranks are connected."""
    options = (*OPTIONS, "--prompt", "a", "--tensor", "2", "--attention", "varlen")
    _, err = run(place, *options, status=2)
    assert err.startswith("ee-llm: attention 'varlen' needs a GPU")
    assert err.count("\n") == 1


def test_impossible_layout_starts_no_rank(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_config(num_heads=6, num_kv_heads=3, hidden_size=48, vocab_size=264)
    save_model(place / "odd", other, random_tensors(other, dtype=torch.float32))
    monkeypatch.setattr(generate_command, "launch", lambda *_: pytest.fail("ranks were started"))
    arguments = ["generate", "--checkpoint", str(place / "odd"), "--prompt", "a", "--tensor"]
    assert main.main([*arguments, "2"]) == 2
    said = "tensor = 2 does not divide num_kv_heads = 3. Use tensor = 1 or 3."
    assert capsys.readouterr().err == f"ee-llm: {said}\n"
    monkeypatch.setattr(distributed.devices, "num_gpus", lambda: 2)
    assert main.main([*arguments, "3"]) == 2
    said = "tensor = 3 x pipeline = 1 needs 3 GPUs, but this machine has 2."
    assert said in capsys.readouterr().err


def _long_batch(place: Path, tmp_path: Path, num_short: int = 3) -> tuple[str, ...]:
    """Return the options of a batch with some short prompts and a long one at the end."""
    lines = [{"prompt": f"{n}", "max_tokens": 4} for n in range(num_short)]
    lines.append({"prompt": "long", "max_tokens": 8000})
    (tmp_path / "batch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = ("--batch-file", str(tmp_path / "batch.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    return ("--checkpoint", "long", "--dtype", "float64", "--thresholds", "0.3", *batch)


def _wait_for(path: Path, num_lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("layout", ["pipeline 2", pytest.param("tensor 2", marks=pytest.mark.slow)])
def test_lost_rank_ends_all(place: Path, tmp_path: Path, layout: str, lost: int) -> None:
    """Within seconds, although the timeout is ten minutes; finished records are kept."""
    with started(place, "generate", *_long_batch(place, tmp_path), *LAYOUTS[layout]) as launcher:
        _wait_for(tmp_path / "out.jsonl", 3, launcher)
        ranks = _ranks(launcher, 2)
        os.kill(ranks[lost], signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
    # The launcher may notice the killed rank or the rank that lost it first.
    said = err.splitlines()[-1]
    if launcher.returncode == 1:
        assert re.match(r"ee-llm: .*(lost another rank|no stage sent)", said)
    else:
        assert launcher.returncode == 128 + signal.SIGKILL
        assert said.startswith(f"ee-llm: rank {lost} was killed by SIGKILL")
    assert "Traceback" not in err
    assert [pid for pid in ranks if Path(f"/proc/{pid}").exists()] == []
    assert len(records(tmp_path / "out.jsonl")) == 3


@pytest.mark.slow
def test_hanging_rank_ends_all(place: Path, tmp_path: Path) -> None:
    """The rank that waits for it fails after the timeout with a message."""
    arguments = (*_long_batch(place, tmp_path), "--pipeline", "2", "--timeout-s", "5")
    with started(place, "generate", *arguments) as launcher:
        _wait_for(tmp_path / "out.jsonl", 3, launcher)
        ranks = _ranks(launcher, 2)
        os.kill(ranks[1], signal.SIGSTOP)
        _, err = launcher.communicate(timeout=90)  # the launcher gives a rank half a minute
    assert launcher.returncode == 1
    assert "stage 0" in err.splitlines()[-1] or "no stage sent" in err.splitlines()[-1]
    assert [pid for pid in ranks if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.parametrize("layout", ["one process", "pipeline 2"])
def test_ctrl_c_ends_a_batch_with_one_line(place: Path, tmp_path: Path, layout: str) -> None:
    """Interrupted ranks used to abort, because waiting threads outlived the main thread."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    try:
        arguments = (*_long_batch(place, tmp_path), *LAYOUTS.get(layout, ()))
        with started(place, "generate", *arguments) as process:
            _wait_for(tmp_path / "out.jsonl", 3, process)
            ranks = _ranks(process, 2) if layout in LAYOUTS else []
            for pid in (process.pid, *ranks):  # a terminal sends the signal to all of them
                os.kill(pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert process.returncode == 128 + signal.SIGINT
    said = "stopped by SIGINT" if layout in LAYOUTS else "interrupted"
    assert err.splitlines()[-1] == f"ee-llm: {said}"
    assert not re.search("Traceback|terminate|SIGABRT", err)
    assert len(records(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize("layout", ["one process", "pipeline 2"])
def test_killed_batch_is_resumed(place: Path, tmp_path: Path, layout: str) -> None:
    """After SIGKILL another layout completes the batch, with the same records."""
    arguments = _long_batch(place, tmp_path)
    with started(place, "generate", *arguments, *LAYOUTS.get(layout, ())) as process:
        _wait_for(tmp_path / "out.jsonl", 3, process)
        ranks = _ranks(process, 2) if layout in LAYOUTS else []
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
    finished = (tmp_path / "out.jsonl").read_bytes()
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"id": "4", "prompt": "lo')
    lines = (tmp_path / "batch.jsonl").read_text().replace("8000", "10")
    (tmp_path / "batch.jsonl").write_text(lines)
    other = LAYOUTS["pipeline 2"] if layout == "one process" else ()
    _, err = run(place, *arguments, *other)
    assert "4 prompts, 3 of them from an earlier run; 10 tokens" in err
    assert (tmp_path / "out.jsonl").read_bytes().startswith(finished)
    (tmp_path / "out.jsonl").rename(tmp_path / "resumed.jsonl")
    run(place, *arguments)
    resumed, in_one_go = records(tmp_path / "resumed.jsonl"), records(tmp_path / "out.jsonl")
    assert resumed.keys() == in_one_go.keys() == {"1", "2", "3", "4"}
    for id, record in in_one_go.items():
        assert_equal(resumed[id], record)


def test_ranks_of_another_launcher(place: Path) -> None:
    """torchrun starts them, as on several machines; an error does not abort there either."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, "2", "--module", "ee_llm", "generate", *OPTIONS, "--prompt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = [
        subprocess.run(
            [*command, prompt, "--pipeline", "2", "--json"],
            cwd=place, env=environment, capture_output=True, text=True, timeout=120,
        )
        for prompt in ("prompt 0", "x" * 49)
    ]  # fmt: skip
    assert len(json.loads(results[0].stdout)["token_ids"]) == 20
    assert results[0].returncode == 0
    assert results[1].returncode != 0
    assert "49 tokens, more than" in results[1].stderr
    assert "SIGABRT" not in results[1].stderr


def test_sampled_data_is_the_same_over_ranks(place: Path) -> None:
    """Only the first rank writes; every rank must see the same requests."""
    sampling = ("--num-tokens", "60", "--max-tokens", "12", "--seed", "3", "--dtype", "float64")
    command = ["data", "generate", "--checkpoint", str(place / "run"), *sampling, "--json"]
    assert main.main([*command, "--output", str(place / "one")]) == 0
    layout = LAYOUTS["tensor 2 pipeline 2"]
    with started(place, *command, *layout, "--output", "several") as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert json.loads(out)["num_tokens"] >= 60
    for suffix in (".bin", ".idx", ".meta.json"):
        assert Path(f"{place / 'several'}{suffix}").read_bytes() == (
            Path(f"{place / 'one'}{suffix}").read_bytes()
        )
