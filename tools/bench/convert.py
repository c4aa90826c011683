"""Measure the memory and time of converting a sharded checkpoint of random weights and back.

    python tools/bench/convert.py --json convert.json [--quick]

Each conversion runs in a separate process, which reports its peak resident memory. See
docs/reference/benchmarks.md for the method and results.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import load_config
from ee_llm.conversion.huggingface.settings import write_settings
from ee_llm.conversion.huggingface.shards import write_shards
from ee_llm.conversion.huggingface.tables import rows_of
from tools.bench import report

ROOT = Path(__file__).resolve().parents[2]
# A Llama of this width has 59 MB per layer in bfloat16, and 131 MB each for embedding and output.
WIDTH, FFN, VOCABULARY = 2048, 2048, 32000
QUICK = {"gigabytes": 0.5, "rounds": 1}


@dataclass(frozen=True)
class Options:
    """Peak memory and time of `ee-llm convert`, to a checkpoint and back."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Convert a checkpoint of 0.5 GB once, within a minute on two cores. Explicit options take
    precedence."""
    gigabytes: float = 4.0
    """Size of the checkpoint in 10^9 bytes."""
    shard_gigabytes: float = 1.0
    """Size of each file of the checkpoint in 10^9 bytes."""
    rounds: int = 3
    """Number of conversions in each direction; the figures are their medians."""
    directory: Path | None = None
    """Write the files to this directory, which needs space for three times the checkpoint; None
    uses the system's directory for temporary files."""


def main(args: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the figures."""
    options = report.read_options(Options, QUICK, args)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows = measure(options, Path(directory))
    report.print_table("Conversion, tensor by tensor", [_cells(row) for row in rows])
    into, out = ([r for r in rows if r["direction"] == way] for way in ("in", "out"))
    figures = {
        "peak_memory_vs_checkpoint": _median(into, "peak_bytes") / into[0]["bytes"],
        "seconds_per_gb": _median(into, "seconds") / (into[0]["bytes"] / 1e9),
        "peak_memory_vs_checkpoint_out": _median(out, "peak_bytes") / out[0]["bytes"],
        "seconds_per_gb_out": _median(out, "seconds") / (out[0]["bytes"] / 1e9),
    }
    report.write_json(options.json, rows, figures)


def measure(options: Options, directory: Path) -> list[dict[str, Any]]:
    """Return a row for each conversion. The files are written to `directory`."""
    size = make_folder(directory / "theirs", options.gigabytes, options.shard_gigabytes)
    largest = VOCABULARY * WIDTH * 2
    rows = []
    for index in range(options.rounds):
        ours, back = directory / f"ours-{index}", directory / f"back-{index}"
        to_ours = ["convert", str(directory / "theirs"), "--tokenizer", "bytes"]
        to_ours += ["--output", str(ours)]
        to_theirs = ["convert", str(ours), "--to", "hf", "--output", str(back)]
        for direction, arguments in (("in", to_ours), ("out", to_theirs)):
            seconds, peak, idle = run_measured(arguments)
            rows.append(
                {
                    "direction": direction,
                    "bytes": size,
                    "largest_tensor_bytes": largest,
                    "seconds": seconds,
                    "peak_bytes": peak,
                    "idle_bytes": idle,
                }
            )
        for path in (ours, back):
            shutil.rmtree(path)
    return rows


def run_measured(arguments: list[str]) -> tuple[float, int, int]:
    """Run `ee-llm` in a new process and return its time and memory.

    Returns:
        The seconds of the command, the peak resident bytes, and the resident bytes before the
        command starts. Both numbers of bytes include Python and torch. The pages of a file count
        while it is mapped.
    """
    code = (
        "import json, resource, sys, time\n"
        "from ee_llm.cli.main import main\n"
        "import ee_llm.conversion.convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "idle, begin = peak(), time.perf_counter()\n"
        "status = main([*sys.argv[1:], '--json'])\n"
        "print(json.dumps([time.perf_counter() - begin, peak(), idle]))\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    seconds, peak, idle = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak, idle


def make_folder(path: Path, gigabytes: float, shard_gigabytes: float) -> int:
    """Write a bfloat16 Llama in Hugging Face's format and return the bytes of its weights."""
    layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
    outside = 2 * 2 * VOCABULARY * WIDTH
    num_layers = max(1, math.ceil((gigabytes * 1e9 - outside) / layer))
    config = load_config(
        None,
        {
            "model.num_layers": num_layers,
            "model.hidden_size": WIDTH,
            "model.num_heads": 16,
            "model.ffn_hidden_size": FFN,
            "model.vocab_size": VOCABULARY,
        },
    )
    family, settings = write_settings(config, torch.bfloat16)
    rows = rows_of(family.table, config)
    keys = {
        key: TensorSpec(shape, torch.bfloat16)
        for name, whole in tensor_shapes(config).items()
        for key, shape in zip(rows[name].keys, rows[name].shapes(config.model, whole), strict=True)
    }
    generator = torch.Generator().manual_seed(0)

    def draw(key: str) -> Tensor:
        return torch.empty(keys[key].shape, dtype=torch.bfloat16).normal_(generator=generator)

    path.mkdir()
    write_shards(path, keys, draw, int(shard_gigabytes * 1e9))
    (path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return sum(spec.num_bytes for spec in keys.values())


def _median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "direction": row["direction"],
        "GB": f"{row['bytes'] / 1e9:.2f}",
        "largest tensor, MB": f"{row['largest_tensor_bytes'] / 1e6:.0f}",
        "seconds": f"{row['seconds']:.1f}",
        "peak memory, MB": f"{row['peak_bytes'] / 1e6:.0f}",
        "idle process, MB": f"{row['idle_bytes'] / 1e6:.0f}",
        "peak / checkpoint": f"{row['peak_bytes'] / row['bytes']:.3f}",
    }


if __name__ == "__main__":
    main()
