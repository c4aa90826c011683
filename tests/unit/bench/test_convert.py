"""Test the conversion benchmark, and that tools/checkpoint/convert.py runs the command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.bench.test_report import run
from tests.unit.conversion.huggingface.folders import make_folder
from tools.bench import convert

pytestmark = pytest.mark.thorough

TOOLS = Path(__file__).resolve().parents[3] / "tools"


def test_convert_writes_its_figures(tmp_path, monkeypatch):
    written = run("convert", tmp_path / "convert.json", {"gigabytes": 0.3, "rounds": 1})
    figures = written["figures"]
    assert {"peak_memory_vs_checkpoint", "seconds_per_gb"} <= set(figures)
    assert [row["direction"] for row in written["rows"]] == ["in", "out"]
    for row in written["rows"]:
        # More than an idle process needs, but less than three times the largest tensor.
        needed = row["peak_bytes"] - row["idle_bytes"]
        assert 0 < needed < 3 * row["largest_tensor_bytes"]
        assert row["bytes"] > 2.5e8


def test_transformers_loads_the_written_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    for name, size in {"WIDTH": 64, "FFN": 48, "VOCABULARY": 300}.items():
        monkeypatch.setattr(convert, name, size)
    size = convert.make_folder(tmp_path / "theirs", 3e-4, 1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert theirs.dtype == torch.bfloat16
    assert sum(p.numel() * 2 for p in theirs.parameters()) == size


def test_the_tool_runs_the_command(tmp_path):
    folder = make_folder(tmp_path / "theirs")
    command = [sys.executable, str(TOOLS / "checkpoint" / "convert.py"), str(folder)]
    command += ["--output", str(tmp_path / "ours")]
    for status, expected in ((0, "33 tensors"), (2, "already exists")):
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == status
        assert expected in done.stdout + done.stderr
