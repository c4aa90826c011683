"""The benchmark of layer dropout: the shares that it expects, and that it writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import layer_dropout
from tools.bench.layer_dropout import Options, expected_share, kept_share, make_config

pytestmark = pytest.mark.thorough

TOOL = Path(layer_dropout.__file__)


def test_the_figures_are_written(tmp_path):
    path = tmp_path / "layer_dropout.json"
    options = {"seq-length": 16, "micro-batch-size": 2, "num-microbatches": 1, "rounds": 2}
    command = [sys.executable, str(TOOL), "--json", str(path), "--threads", "1"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(path.read_text())
    figures = written["figures"]
    assert {"dropout_time_ratio", "dropout_expected_ratio"} <= set(figures)
    assert figures["dropout_expected_ratio"] == pytest.approx(0.7746, abs=1e-4)
    assert written["rows"][0]["time_ratio"] == written["rows"][0]["kept_ratio"] == 1


def test_expected_shares_are_those_of_the_equation():
    """8 layers: the mean of 2^(l/7) - 1 is (1/8) * (2^(8/7) - 1) / (2^(1/7) - 1) - 1 = 0.4509."""
    mean = (2 ** (8 / 7) - 1) / (2 ** (1 / 7) - 1) / 8 - 1
    assert mean == pytest.approx(0.4509, abs=1e-4)
    for probability in (0.0, 0.2, 0.5):
        config = make_config(Options(), probability)
        assert expected_share(config) == pytest.approx(1 - probability * mean)
        kept = [kept_share(config, step) for step in range(300)]
        assert sum(kept) / len(kept) == pytest.approx(expected_share(config), abs=0.01)
