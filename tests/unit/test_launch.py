"""Ranks on this machine: what they run, and the one account of what went wrong."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ee_llm
from ee_llm import launch

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from ee_llm.launch import launch; launch(2, sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_ranks_run_the_command() -> None:
    done = run_ranks("--version")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"ee-llm {ee_llm.__version__}"] * 2


def test_a_mistake_found_in_every_rank_is_told_once() -> None:
    """N ranks that say the same, and a launcher's page about each, hide the one line that helps."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus")
    assert done.returncode == 2
    assert done.stderr.startswith("ee-llm: ")
    assert done.stderr.count("\n") == 1
    assert "/nowhere/corpus" in done.stderr


def test_a_rank_that_told_nothing_is_named_with_its_status() -> None:
    """A traceback goes to standard error, not to the launcher, whose library then says <NONE>."""
    done = run_ranks("data", "stats", "--prefix", "/nowhere/corpus", EE_LLM_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"ee-llm: rank [01] ended with status 1; what it said is above", last)


def test_who_was_killed_is_named_though_another_said_first_that_it_lost_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import (
        ChildFailedError,
        ProcessFailure,
    )

    def failure(rank: int, status: int, told: str) -> ProcessFailure:
        file = ROOT / "there-is-none"
        found = ProcessFailure(rank, 1, status, str(file))
        found.error_file_data = {"message": told, "ee_llm": told, "timestamp": str(rank)}
        return found

    failures = {0: failure(0, 1, "lost another rank"), 1: failure(1, -signal.SIGKILL, "")}

    def fail(_: object) -> None:
        raise ChildFailedError("ee_llm", failures)

    monkeypatch.setattr(run, "run", fail)
    with pytest.raises(SystemExit) as ended:
        launch.launch(2, ["--version"])
    assert ended.value.code == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, "SIGKILL; the machine may be out of memory"),
        (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}"),  # has no name
    ],
)
def test_a_rank_that_was_killed_is_named_with_its_signal(
    tmp_path: Path, number: int, expected: str
) -> None:
    """As by a machine that is out of memory."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n    os.kill(os.getpid(), {int(number)})\n"
    )
    done = run_ranks("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 128 + number
    assert done.stderr.splitlines()[-1] == f"ee-llm: rank 1 was ended by {expected}"
    assert done.stderr.count("\n") == 1
