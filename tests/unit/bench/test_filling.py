"""The experiment on filled bubbles: steps that take the same time, and runs that fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import filling

TOOL = Path(filling.__file__)


@pytest.mark.parametrize(
    ("way", "steps"), [("not filled", 120), ("warm-up", 120), ("cool-down", 108), ("both", 108)]
)
def test_each_way_has_the_steps_of_the_same_time(way, steps):
    """The numbers of docs/explanation/experiments.md."""
    assert filling.steps_in_time(filling.WAYS[way], 120) == steps


@pytest.mark.thorough
def test_a_run_that_fails_is_told_without_a_traceback():
    command = [sys.executable, str(TOOL), "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ee-llm: examples/quickstart.toml with the options given: training.steps: must be greater "
        "than 0, got 0",
        "filling: a run ended with status 2; what it said stands above",
    ]
