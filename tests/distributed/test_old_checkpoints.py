"""A run of version 0.1.0 continues, on the two pipeline ranks that it had."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "unit" / "checkpoint" / "data" / "checkpoint-0.1.0.tar.xz"


def _ee_llm(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ee_llm", *arguments]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_run_continues_from_its_checkpoint(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    lines = [f"The quick brown fox number {i} jumps over the lazy dog {i * i}." for i in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    prepare = ["--inputs", "text.txt", "--output", "data/c", "--tokenizer", "bytes"]
    _ee_llm(tmp_path, "data", "prepare", *prepare)
    config = tmp_path / "run" / "checkpoints" / "step-00000003" / "config.toml"
    train = ["--config", str(config), "--nproc", "2", "--training.steps", "4"]
    _ee_llm(tmp_path, "train", *train)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records if "lm loss" in record] == [4]
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
