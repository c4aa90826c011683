"""Agreement of exits with the final exit: copied, from least squares, and tuned after that.

    python tools/bench/exit_quality.py --json exit_quality.json --checkpoint runs/smollm2 \
        --train data/train --test data/test
    python tools/bench/exit_quality.py --json exit_quality.json --quick

The model and the test text are the same for all. See docs/reference/benchmarks.md.
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ee_llm
from ee_llm.checkpoint.read import TensorReader, resolve_checkpoint
from ee_llm.evaluation.result import EvaluationResult
from tools.bench import report
from tools.bench.small_model import run_command, small_model

QUICK = {
    "num_tokens": 20_000,
    "test_tokens": 2048,
    "steps": 20,
    "lr": 1e-3,
    "seq_length": 128,
}


@dataclass(frozen=True)
class Options:
    """Measure how often exits agree with the final exit."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Train a small model on Python's sources instead of reading a checkpoint: two minutes on two
    cores. Explicit options take precedence."""
    checkpoint: Path | None = None
    """Run directory or checkpoint of a model without exits; required without --quick."""
    train: str | None = None
    """Prefix of prepared data for least squares and tuning; required without --quick."""
    test: str | None = None
    """Prefix of prepared data to measure agreement on; required without --quick."""
    num_tokens: int = 100_000
    """Number of tokens for least squares."""
    test_tokens: int = 10_240
    """Number of tokens to measure on."""
    steps: int = 50
    """Number of tuning steps."""
    batch_size: int = 8
    """Number of sequences per tuning step."""
    seq_length: int = 256
    """Number of tokens per sequence."""
    lr: float = 3e-4
    """Learning rate of tuning."""
    threads: int | None = None
    """Number of CPU threads; None uses all cores."""


def boundaries_of(num_layers: int) -> tuple[int, ...]:
    """Return the boundaries at 2/5, 2/3 and 4/5 of the depth; the figures are of the second."""
    return tuple(round(num_layers * share) for share in (2 / 5, 2 / 3, 4 / 5))


def measure(
    options: Options, model: Path, train: str, test: str, folder: Path
) -> list[dict[str, Any]]:
    """Return a row per exit and origin of its head, with the seconds and tokens that it took."""
    config = TensorReader(resolve_checkpoint(model)).config()
    boundaries = boundaries_of(config.model.num_layers)
    common = ["--exits", *map(str, boundaries)]
    rows: list[dict[str, Any]] = []

    def add_rows(origin: str, checkpoint: Path, seconds: float, tokens: int) -> None:
        result = ee_llm.evaluate(
            checkpoint,
            data=test,
            num_tokens=options.test_tokens,
            seq_length=options.seq_length,
            dtype="float32",
            progress=False,
        )
        rows.extend(_rows(origin, result, seconds, tokens))

    copied = folder / "copied"
    seconds = run_command("checkpoint", "add-exits", str(model), "--output", str(copied), *common)
    add_rows("copy", copied, seconds, 0)
    mapped = folder / "mapped"
    data = ["--initialization", "least-squares", "--data", train]
    data += ["--num-tokens", str(options.num_tokens), "--seq-length", str(options.seq_length)]
    seconds = run_command(
        "checkpoint", "add-exits", str(model), "--output", str(mapped), *common, *data
    )
    add_rows("least squares", mapped, seconds, options.num_tokens)
    tuned_tokens = options.steps * options.batch_size * options.seq_length
    for origin, objective in (("labels", "labels"), ("distilled", "distill")):
        tuning = {
            "tuning.checkpoint": mapped,
            "tuning.objective": objective,
            "output": folder / origin,
            "data.prefixes": train,
            "data.split": "1,0,0",
            "data.seq_length": options.seq_length,
            "training.steps": options.steps,
            "training.micro_batch_size": options.batch_size,
            "training.global_batch_size": options.batch_size,
            "training.dtype": "float32",
            "training.eval_interval": 0,
            "optimizer.lr": options.lr,
            "optimizer.warmup_steps": max(1, options.steps // 10),
            "checkpoint.interval": 0,
        }
        values = (text for name, value in tuning.items() for text in (f"--{name}", str(value)))
        taken = seconds + run_command("tune", *values)
        add_rows(origin, folder / origin, taken, options.num_tokens + tuned_tokens)
    return rows


def _rows(
    origin: str, result: EvaluationResult, seconds: float, tokens: int
) -> list[dict[str, Any]]:
    return [
        {
            "origin": origin,
            "boundary": exit.boundary,
            "agreement": exit.agreement,
            "agreement_margin": exit.agreement_margin,
            "loss": exit.loss,
            "final_loss": result.exits[-1].loss,
            "seconds": seconds,
            "tokens": tokens,
        }
        for exit in result.exits[:-1]
    ]


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the agreement at two thirds of the depth, the second exit of each origin."""
    by_origin: dict[str, list[float]] = {}
    for row in rows:
        by_origin.setdefault(row["origin"].replace(" ", "_"), []).append(row["agreement"])
    return {f"agreement_{origin}": agreement[1] for origin, agreement in by_origin.items()}


def _sources(options: Options, folder: Path) -> tuple[Path, str, str]:
    given = (options.checkpoint, options.train, options.test)
    if options.checkpoint is not None and options.train is not None and options.test is not None:
        return options.checkpoint, options.train, options.test
    if any(value is not None for value in given) or not options.quick:
        raise ValueError("give --checkpoint, --train and --test, or --quick without them")
    return small_model(folder)


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the commands
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, train, test = _sources(options, folder)
        rows = measure(options, model, train, test, folder)
    title = f"agreement with the final exit on {options.test_tokens:,} tokens"
    report.print_table(title, [_cells(row) for row in rows])
    report.write_json(options.json, rows, figures_of(rows))


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "heads": row["origin"],
        "boundary": str(row["boundary"]),
        "agreement [95 %]": f"{row['agreement']:.3f} ± {row['agreement_margin'] or 0:.3f}",
        "loss": f"{row['loss']:.3f}",
        "final loss": f"{row['final_loss']:.3f}",
        "tokens": f"{row['tokens']:,}",
        "seconds": f"{row['seconds']:.0f}",
    }


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"exit_quality: {error}")
