"""Test the benchmark of tuning: its counts, and that it writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import report, tuning
from tools.bench.tuning import CASES, Case, Options, flops, make_config

pytestmark = pytest.mark.thorough

TOOL = Path(tuning.__file__)


def test_the_figures_are_written(tmp_path):
    path = tmp_path / "tuning.json"
    options = {"seq-length": 16, "micro-batch-size": 1, "num-microbatches": 1, "rounds": 2}
    command = [sys.executable, str(TOOL), "--json", str(path)]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "figures"}
    assert {"step_time_vs_full", "memory_vs_full"} <= set(written["figures"])
    assert len(written["rows"]) == len(CASES)
    # Bytes are counted, not sampled, so they are the same on every machine.
    first = written["rows"][0]
    assert first["tuned_kept_bytes"] == state_bytes(first)
    assert 0 < first["tuned_passing_bytes"] < first["full_passing_bytes"]


def state_bytes(row):
    """Return 4 bytes per built and 12 more per trained parameter: four layers, two exits."""
    hidden, ffn, vocab = 288, 768, 4096
    layer = 4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden
    head = 3 * hidden * ffn + 2 * hidden + hidden * vocab
    assert row["exits"] == [2, 4]
    return 4 * (hidden * vocab + 4 * layer + 2 * head) + 12 * 2 * head


@pytest.mark.parametrize(
    ("case", "share"),
    [
        (Case((2, 4), ("mlp", "norm"), "own"), 0.381),
        (Case((2, 4), ("norm",), "shared"), 0.248),
        (Case((4, 7), ("mlp", "norm"), "own"), 0.461),
    ],
)
def test_predicted_ratios_are_those_of_the_documentation(case, share):
    full, tuned = (flops(make_config(Options(), case, is_tuning)) for is_tuning in (False, True))
    assert tuned / full == pytest.approx(share, abs=5e-4)


def test_explicit_options_take_precedence_over_quick():
    quick = report.read_options(Options, tuning.QUICK, ["--quick", "--rounds", "3"])
    assert quick == Options(**tuning.QUICK | {"quick": True, "rounds": 3})
