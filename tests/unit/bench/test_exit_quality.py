"""Test the benchmark of exits' agreement on a tiny model: what it runs and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import make_config, write_corpus, write_random
from tools.bench import exit_quality
from tools.bench.exit_quality import boundaries_of, figures_of

pytestmark = pytest.mark.thorough

TOOL = Path(exit_quality.__file__)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_all_origins_are_measured_on_the_same_text(tmp_path):
    train = write_corpus(tmp_path / "train", 60)
    test = write_corpus(tmp_path / "test", 20)
    exitless = {"exits.boundaries": (), "exits.weights": (), "exits.output": "shared"}
    config = make_config(tmp_path, train, **exitless, **{"model.num_layers": 6})
    model, _ = write_random(tmp_path / "model", config)
    sizes = {"num-tokens": 600, "test-tokens": 320, "steps": 3, "batch-size": 2, "seq-length": 16}
    done = run(
        *("--json", str(tmp_path / "result.json"), "--checkpoint", str(model)),
        *("--train", train, "--test", test, "--threads", "1"),
        *(text for name, size in sizes.items() for text in (f"--{name}", str(size))),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    rows = written["rows"]
    assert [(row["origin"], row["boundary"]) for row in rows] == [
        (origin, boundary)
        for origin in ("copy", "least squares", "labels", "distilled")
        for boundary in (2, 4, 5)
    ]
    assert len({row["final_loss"] for row in rows}) == 1, "the model itself does not change"
    assert [row["tokens"] for row in rows[::3]] == [0, 600, *[600 + 3 * 2 * 16] * 2]
    assert written["figures"] == figures_of(rows)
    assert rows[4]["agreement"] > rows[1]["agreement"]


def test_figures_are_of_the_exit_at_two_thirds_of_the_depth():
    assert boundaries_of(30) == (12, 20, 24)
    assert boundaries_of(6) == (2, 4, 5)


def test_missing_inputs_are_named():
    done = run("--checkpoint", "runs/none")
    assert done.returncode == 1
    assert "give --checkpoint, --train and --test, or --quick" in done.stderr
