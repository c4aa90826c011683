"""Test the experiment on filled bubbles: numbers of steps, and failing runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import filling

TOOL = Path(filling.__file__)


@pytest.mark.parametrize(
    ("way", "steps"), [("not filled", 120), ("warm-up", 120), ("cool-down", 108), ("both", 108)]
)
def test_each_way_takes_the_same_time(way, steps):
    """The numbers are those of docs/explanation/experiments.md."""
    assert filling.steps_in_time(filling.WAYS[way], 120) == steps


@pytest.mark.thorough
def test_a_failed_run_is_reported_without_a_traceback():
    command = [sys.executable, str(TOOL), "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ee-llm: examples/quickstart.toml with the options given: training.steps: must be greater "
        "than 0, got 0",
        "filling: a run failed with status 2. See its output above.",
    ]
