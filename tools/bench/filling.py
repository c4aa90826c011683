"""Compare validation losses with and without filled bubbles in the same training time.

    python tools/bench/filling.py --json filling.json [--quick]

Trains the quick start's model on its data over four pipeline ranks, once for each seed and way of
filling. Run ./scripts/quickstart.sh first. See docs/explanation/experiments.md for the method.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ee_llm.config import load_config
from ee_llm.pipeline.planner.costs import NOMINAL
from ee_llm.pipeline.planner.predict import predict
from ee_llm.training.reporting.run_log import loss_name
from tools.bench import report

WAYS = {
    "not filled": {},
    "warm-up": {"parallel.fill_warmup": "auto"},
    "cool-down": {"parallel.fill_cooldown": "auto"},
    "both": {"parallel.fill_warmup": "auto", "parallel.fill_cooldown": "auto"},
}
PIPELINE = {"parallel.pipeline": 4, "training.micro_batch_size": 4}
OTHERS = {"training.eval_steps": 16, "checkpoint.interval": 0}


@dataclass(frozen=True)
class Options:
    """Compare validation losses of the quick start's model with and without filled bubbles."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Train with one seed for few steps, to try the benchmark. Explicit options take precedence."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the initial weights and the order of the data; None uses 1, 2 and 3."""
    steps: int | None = None
    """Number of training steps without filling; None uses 120."""


def steps_in_time(way: dict[str, str], steps: int) -> int:
    """Return the number of steps that take as long as `steps` unfilled ones, by simulation."""

    def makespan(extra: dict[str, str]) -> float:
        config = load_config(ROOT / "examples" / "quickstart.toml", {**PIPELINE, **extra})
        return predict(config, config.num_microbatches(4), NOMINAL).simulation.makespan

    return round(steps * makespan({}) / makespan(way))


def train(seed: int, steps: int, way: dict[str, str], output: Path) -> dict[str, float]:
    """Train in new processes and return the final validation loss of each exit in nats."""
    options: dict[str, object] = {
        **PIPELINE,
        **OTHERS,
        **way,
        "training.seed": seed,
        "training.steps": steps,
        "training.eval_interval": steps,
        "output": output,
    }
    command = [sys.executable, "-m", "ee_llm", "train"]
    command += ["--config", "examples/quickstart.toml", "--nproc", "4"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    config = load_config(ROOT / "examples" / "quickstart.toml")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    layers = config.model.num_layers
    names = [loss_name(b, layers) for b in (*config.exits.boundaries, layers)]
    [end] = [line for line in lines if f"{names[0]} validation" in line]
    return {name: end[f"{name} validation"] for name in names}


def main(options: Options) -> None:
    """Train, print the table and write the figures."""
    seeds = options.seeds or ((1,) if options.quick else (1, 2, 3))
    steps = (25 if options.quick else 120) if options.steps is None else options.steps
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:  # alternate, so that an interrupted experiment is still useful
            for way, extra in WAYS.items():
                number = steps_in_time(extra, steps)
                found = train(seed, number, extra, Path(scratch) / f"{seed}-{way}")
                rows.append({"way": way, "seed": seed, "steps": number, **found})
                print(rows[-1], flush=True)
    names = [name for name in rows[0] if name not in ("way", "seed", "steps")]
    title = f"validation loss in nats in the time of {steps} unfilled steps"
    report.print_table(title, [_cells(row) for row in rows])
    figures = {}
    plain = {row["seed"]: row for row in rows if row["way"] == "not filled"}
    for way in list(WAYS)[1:]:
        for name in names:
            gains = [plain[r["seed"]][name] - r[name] for r in rows if r["way"] == way]
            figures[f"{way}_{name}_gain".replace(" ", "_").replace("-", "")] = statistics.mean(
                gains
            )
            each = ", ".join(f"{gain:+.3f}" for gain in gains)
            print(f"{way}: {name} decreases by {statistics.mean(gains):+.3f} nats ({each})")
    report.write_json(options.json, rows, figures)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{value:.3f}" if isinstance(value, float) else str(value)
        for name, value in row.items()
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except subprocess.CalledProcessError as error:
        sys.exit(f"filling: a run failed with status {error.returncode}. See its output above.")
