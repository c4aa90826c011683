"""The commands in separate processes, from text to generated text, with signals and failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ee_llm.checkpoint import directory
from tests.distributed.runs import (
    events,
    log_of,
    text,
    training_log,
    validation_log,
    write_corpus,
)

TINY = """
[model]
num_layers = 4
hidden_size = 32
num_heads = 4
num_kv_heads = 2
ffn_hidden_size = 48
vocab_size = 320
max_seq_length = 32

[exits]
boundaries = [1, 2]

[parallel]
pipeline = 2
timeout_s = 60

[data]
tokenizer = "tokenizer.model"
prefixes = ["corpus"]
split = [0.9, 0.1, 0.0]

[optimizer]
lr = 2e-2

[training]
steps = 40
global_batch_size = 8
micro_batch_size = 4
dtype = "float32"
eval_interval = 25

[logging]
interval = 10
"""
PROMPT = "the quick brown"


class Workplace:
    """A directory with a configuration, in which commands run as separate processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ee_llm", *arguments],
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Run a command that must end with `status`; return its standard output and error."""
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=180)
        assert process.returncode == status, err
        return out, err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Create a text, its vocabulary, the prepared data and a model trained on them."""
    place = Workplace(tmp_path_factory.mktemp("workplace"))
    (place.path / "texts").mkdir()
    for number, sentence in enumerate(text(200)):
        (place.path / "texts" / f"{number:03}.txt").write_text(sentence)
    (place.path / "tiny.toml").write_text(TINY)
    options = ("--output", "tokenizer.model", "--vocab-size", "320")
    place.run("data", "train-tokenizer", "--inputs", "texts", *options)
    options = ("--output", "corpus", "--tokenizer", "tokenizer.model")
    place.run("data", "prepare", "--inputs", "texts", *options)
    _, place.said = place.run("train", "--config", "tiny.toml", "--nproc", "2", "--output", "run")
    return place


def test_training_reports(workplace):
    """The output has the losses of every exit in training and validation, and the model's path."""
    run = workplace.path / "run"
    assert sorted(training_log(run)) == [10, 20, 30, 40]
    assert sorted(validation_log(run)) == [25, 40]
    last = validation_log(run)[40]
    for name in ("exit 1 loss", "exit 2 loss", "lm loss"):
        assert last[f"{name} validation"] < 2.5  # log(320) is 5.8
    assert "step 40 is saved in run/checkpoints/step-00000040" in workplace.said
    assert (run / "config.toml").is_file()


@pytest.mark.parametrize("strategy", ["exact", "full"])
def test_generation(workplace, strategy):
    options = ["--prompt", PROMPT, "--max-tokens", "12"]
    if strategy == "exact":
        options += ["--thresholds", "0.3"]
    out, _ = workplace.run(
        "generate", "--checkpoint", "run", *options, "--strategy", strategy, "--json"
    )
    found = json.loads(out)
    assert found["prompt"] == PROMPT
    assert 0 < len(found["token_ids"]) <= 12
    assert len(found["exits"]) == len(found["token_ids"]) == len(found["confidences"])
    if strategy == "full":
        assert set(found["exits"]) == {4}
    else:
        assert set(found["exits"]) <= {1, 2, 4}
        assert min(found["exits"]) < 4, "nothing exits early"
        early = [c for c, e in zip(found["confidences"], found["exits"], strict=True) if e < 4]
        assert min(early) >= 0.3


def test_tuning(workplace):
    """The configuration of the examples adds an exit to this model, which then generates text."""
    options = {
        "--tuning.checkpoint": "run",
        "--tuning.exits": "3",
        "--data.tokenizer": "tokenizer.model",
        "--data.prefixes": "corpus",
        "--data.seq_length": "32",
        "--data.split": "0.9 0.1 0.0",
        "--training.steps": "12",
        "--output": "tuned",
        "--exits.boundaries": "1 2 3",
    }
    words = [word for name, value in options.items() for word in (name, *value.split())]
    example = Path(__file__).resolve().parents[2] / "examples" / "tune.toml"
    _, said = workplace.run("tune", "--config", str(example), "--nproc", "2", *words)
    assert "tuning exits at [3]: norm; their output weight is the final exit's" in said
    assert "a step computes 3 of 4 layers" in said
    assert "starting from run/checkpoints/step-000000" in said
    assert "WARNING" not in said
    assert "mapping is empty" not in said
    name = "exit 3 loss validation"
    [last] = [line for line in log_of(workplace.path / "tuned") if name in line]
    assert last[name] < 2.5
    options = ("--prompt", PROMPT, "--thresholds", "0.3", "--max-tokens", "12", "--json")
    out, _ = workplace.run("generate", "--checkpoint", "tuned", *options)
    assert set(json.loads(out)["exits"]) <= {1, 2, 3, 4}


@pytest.mark.slow
def test_same_command_resumes_the_run(workplace):
    arguments = ("train", "--config", "tiny.toml", "--nproc", "2", "--output", "run")
    _, said = workplace.run(*arguments, "--training.steps", "43")
    assert "resuming from step 40, run/checkpoints/step-00000040" in said
    assert directory.find_latest(workplace.path / "run").name == "step-00000043"


# Runs that are too long to end by themselves.


class Running:
    """A run with `--nproc 2` that has taken some steps, and its ranks."""

    def __init__(self, workplace: Workplace, output: str) -> None:
        options = ("--training.steps", "100000", "--logging.interval", "1", "--output", output)
        self.output = workplace.path / output
        self.launcher = workplace.start("train", "--config", "tiny.toml", "--nproc", "2", *options)
        deadline = time.monotonic() + 120
        while not (self.output / "log.jsonl").is_file() or len(log_of(self.output)) < 3:
            assert self.launcher.poll() is None, self.launcher.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.launcher.pid)], capture_output=True, text=True
        )
        self.ranks = [int(pid) for pid in listed.stdout.split()]
        assert len(self.ranks) == 2

    def end(self) -> tuple[int, list[str]]:
        """Return the exit status and the messages without progress; assert that no rank is left."""
        _, err = self.launcher.communicate(timeout=60)
        assert [pid for pid in self.ranks if Path(f"/proc/{pid}").exists()] == []
        said = [line for line in err.splitlines() if not line.startswith("step ")]
        return self.launcher.returncode, said[1:]  # without the line about the start


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_saves_and_ends_all_ranks(workplace, number):
    """Preemption and Ctrl-C: the step is completed, saved and reported, and no process is left."""
    running = Running(workplace, f"run-{number.name}")
    running.launcher.send_signal(number)
    status, said = running.end()
    assert status == 128 + number
    latest = directory.find_latest(running.output)
    step = int(latest.name[-8:])
    assert step == max(training_log(running.output))
    where = latest.relative_to(workplace.path)
    assert f"stopped by {number.name} after step {step}: saved in {where}" in said
    assert said[-1] == f"ee-llm: stopped by {number.name}"
    assert len(said) == 3
    assert len(events(running.output, "interrupted")) == 1


@pytest.mark.slow
def test_killed_rank_is_named(workplace):
    running = Running(workplace, "run-killed")
    os.kill(running.ranks[1], signal.SIGKILL)
    status, said = running.end()
    assert status == 128 + signal.SIGKILL
    assert len(said) == 1
    assert said[0].startswith("ee-llm: rank 1 was killed by SIGKILL")


def test_error_of_one_rank_is_one_line(workplace):
    """One of two data ranks reads a bad token; three processes could print an error."""
    write_corpus(workplace.path / "beyond", extra=[5, 999, 7])
    options = (
        "--data.prefixes",
        "beyond",
        "--data.split",
        "1",
        "0",
        "0",
        "--training.eval_interval",
        "0",
        "--data.tokenizer",
        "bytes",
    )
    layout = ("--parallel.pipeline", "1", "--training.steps", "1000", "--output", "run-beyond")
    _, said = workplace.run(
        "train", "--config", "tiny.toml", "--nproc", "2", *options, *layout, status=2
    )
    lines = [line for line in said.splitlines() if not line.startswith("step ")]
    assert len(lines) == 2
    assert lines[1].startswith("ee-llm: ")
    assert "beyond.bin: token id 999 in window" in lines[1]
    assert "model.vocab_size = 320" in lines[1]
