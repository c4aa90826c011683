"""A small model for benchmarks without a checkpoint, trained on Python's own sources."""

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

SMALL_MODEL = {
    "model": {
        "num_layers": 6,
        "hidden_size": 128,
        "num_heads": 4,
        "ffn_hidden_size": 344,
        "vocab_size": 258,
        "max_seq_length": 128,
    },
    "training": {
        "steps": 80,
        "micro_batch_size": 16,
        "global_batch_size": 16,
        "dtype": "float32",
        "eval_interval": 0,
    },
    "optimizer": {"lr": 2e-3, "warmup_steps": 10},
    "checkpoint": {"interval": 0},
}


def run_command(*arguments: str) -> float:
    """Run an ee-llm command and return its seconds. Raises ValueError with its last output."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ee_llm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"ee-llm {' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - start


def small_model(
    folder: Path, exits: tuple[int, ...] = (), vocab_size: int = 258
) -> tuple[Path, str, str]:
    """Train a small model on Python's own sources; return it and its training and test data.

    Args:
        folder: The folder to write to.
        exits: Boundaries of early exits to train with it.
        vocab_size: Size of the vocabulary, of which 258 occur; more make heads costly.
    """
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for name, files in (("train", sources[::2]), ("test", sources[1::8])):
        (folder / name).mkdir()
        for file in files:
            shutil.copy(file, folder / name / f"{file.stem}.txt")
        prefix = str(folder / f"{name}-data")
        run_command("data", "prepare", "--inputs", str(folder / name), "--output", prefix)
    values = {
        f"{section}.{name}": value
        for section, options in SMALL_MODEL.items()
        for name, value in options.items()
    }
    values["model.vocab_size"] = vocab_size
    values |= {"data.prefixes": str(folder / "train-data"), "data.split": "1,0,0"}
    values |= {"output": str(folder / "model")}
    if exits:
        values |= {
            "exits.boundaries": ",".join(map(str, exits)),
            "exits.weights": ",".join("1.0" for _ in exits),
        }
    run_command(
        "train", *(text for name, value in values.items() for text in (f"--{name}", str(value)))
    )
    return folder / "model", str(folder / "train-data"), str(folder / "test-data")
