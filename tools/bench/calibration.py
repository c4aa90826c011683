"""Check the guarantee of a calibration, and compare it with a single threshold for all exits.

The windows of a text are taken for all text there is. Many times, some of them are drawn at random
(with replacement), thresholds are calibrated on these, and their true risk is the mean loss over
all windows. `risk_violation_rate` is the share of calibrations whose true risk exceeds the stated
one; it must be at most --delta. `saving_over_uniform` is the mean saving of calibrated thresholds
over that of the best single threshold, which is calibrated on the same windows in the same way.

Then thresholds from all windows are predicted and used. The full model continues half of the
prompts, and a teacher-forced pass over these texts predicts the depth and the disagreement of the
thresholds. After the other half, they generate. `generation_within_interval` is 1 if both
predictions hold within their 95 % intervals.

    python tools/bench/calibration.py --json out.json --checkpoint runs/tuned --data data/held-out
    python tools/bench/calibration.py --json out.json --quick
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ee_llm
from ee_llm.data.windows import Windows
from ee_llm.evaluation.calibration.choose import Choice, choose
from ee_llm.evaluation.calibration.options import CalibrateOptions
from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.search import Costs, Point, find_path, uniform_path
from ee_llm.inference.choices import Measure
from tools.bench import report
from tools.bench.calibrated_generation import (
    Behaviour,
    Prompts,
    generate,
    is_within,
    predict,
)
from tools.bench.exit_records import collect_exits
from tools.bench.small_model import small_model

QUICK = {"resamplings": 40, "num_windows": 120, "num_tokens": 12_000, "num_prompts": 64}
"""Defaults with --quick, which trains a small model of its own."""


@dataclass(frozen=True)
class Options:
    """Check the guarantee of calibrations by resampling."""

    checkpoint: Path | None = None
    """Checkpoint with exits."""

    data: str | None = None
    """Prefix of prepared text that did not train the exits."""

    num_tokens: int = 20_000
    """Number of tokens of the text."""

    seq_length: int = 64
    """Length of a window."""

    risk: float = 0.05
    """Stated risk: the share of tokens that disagree with the final exit."""

    delta: float = 0.1
    """Stated probability that the risk is exceeded."""

    measure: Measure = "max_probability"
    """Measure of confidence."""

    head_cost: float | None = None
    """Cost of a head in layers. (default: the ratio of their weights)"""

    resamplings: int = 200
    """Number of calibrations."""

    num_windows: int = 300
    """Number of windows of a calibration."""

    num_prompts: int = 128
    """Number of prompts from the end of the data; 0 leaves out the generation."""

    prompt_length: int = 32
    """Length of a prompt in tokens; the rest of --seq-length is generated."""

    json: Path | None = None
    """File to write the figures to."""

    quick: bool = False
    """Run on a small model that is trained first, within a minute or two."""


def calibrate_options(options: Options, checkpoint: Path, data: str) -> CalibrateOptions:
    """Return the options of a pass over the text."""
    return CalibrateOptions(
        checkpoint,
        (data,),
        num_tokens=options.num_tokens,
        seq_length=options.seq_length,
        dtype="float32",
        risk=0.5,
        delta=0.5,
        measure=options.measure,
    )


def collect(options: Options, checkpoint: Path, data: str) -> tuple[Records, Costs]:
    """Return what every exit would do on the text, and what that costs."""
    collector = collect_exits(calibrate_options(options, checkpoint, data))
    costs = collector.costs
    if options.head_cost is not None:
        costs = Costs(costs.boundaries, costs.num_layers, options.head_cost, costs.measure)
    return collector.records(), costs


def resample(
    options: Options,
    population: Records,
    costs: Costs,
    seed: int,
    find: Callable[[Records, Costs, float], list[Point]],
) -> tuple[Choice, float, float]:
    """Return a calibration on random windows, and its true risk and saving."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(population.num_windows, (options.num_windows,), generator=generator)
    choice = choose(population.part(drawn), costs, options.risk, options.delta, seed, find)
    outcome = population.outcome(choice.thresholds)
    risk = float(population.window_losses(outcome.losses).mean())
    cost = float(costs.of(outcome.exits, choice.thresholds).mean())
    return choice, risk, 1 - cost / costs.full


def measure(options: Options, population: Records, costs: Costs) -> list[dict[str, Any]]:
    """Return a row per resampling, with both kinds of thresholds."""
    rows = []
    for seed in range(options.resamplings):
        row: dict[str, Any] = {"seed": seed}
        for name, find in (("per_exit", find_path), ("uniform", uniform_path)):
            choice, risk, saving = resample(options, population, costs, seed, find)
            row |= {f"{name}_risk": risk, f"{name}_saving": saving}
            row[f"{name}_thresholds"] = choice.thresholds
        rows.append(row)
    return rows


def behaviours(
    options: Options, population: Records, costs: Costs, checkpoint: Path, data: str
) -> tuple[Behaviour, Behaviour]:
    """Return the predicted and the generated behaviour of thresholds from all windows."""
    choice = choose(population, costs, options.risk, options.delta)
    policy = ee_llm.ExitPolicy(costs.boundaries, choice.thresholds, costs.measure)
    windows = [
        w for w in Windows([data], options.seq_length, None) if len(w) > options.prompt_length
    ]
    starts = [w[: options.prompt_length].tolist() for w in windows[-options.num_prompts :]]
    max_tokens = options.seq_length - options.prompt_length
    predicted = predict(
        calibrate_options(options, checkpoint, data), policy, Prompts(starts[::2], max_tokens)
    )
    return predicted, generate(checkpoint, policy, Prompts(starts[1::2], max_tokens))


def figures_of(rows: list[dict[str, Any]], risk: float) -> dict[str, float]:
    """Return the figures."""
    savings = {
        name: statistics.fmean(row[f"{name}_saving"] for row in rows)
        for name in ("per_exit", "uniform")
    }
    figures = {
        "risk_violation_rate": sum(row["per_exit_risk"] > risk for row in rows) / len(rows),
        "saving_per_exit": savings["per_exit"],
        "saving_uniform": savings["uniform"],
    }
    if savings["uniform"] > 0:
        figures["saving_over_uniform"] = savings["per_exit"] / savings["uniform"]
    return figures


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    if options.num_prompts and not 0 < options.prompt_length < options.seq_length:
        raise ValueError(
            f"--prompt-length {options.prompt_length} leaves nothing of --seq-length"
            f" {options.seq_length} to generate. Lower it, or use --num-prompts 0."
        )
    if (options.checkpoint is None) != (options.data is None):
        raise ValueError("give --checkpoint and --data, or --quick without them")
    with tempfile.TemporaryDirectory() as name:
        checkpoint, data = options.checkpoint, options.data
        if checkpoint is None or data is None:
            if not options.quick:
                raise ValueError("give --checkpoint and --data, or --quick without them")
            checkpoint, _, data = small_model(Path(name), (2, 4))
        population, costs = collect(options, checkpoint, data)
        if options.num_prompts:
            pair = behaviours(options, population, costs, checkpoint, data)
    rows = measure(options, population, costs)
    figures = figures_of(rows, options.risk)
    title = (
        f"{options.resamplings} calibrations on {options.num_windows} of"
        f" {population.num_windows:,} windows; risk {options.risk:g}, delta {options.delta:g}"
    )
    report.print_table(
        title, [_cells(name, rows, options.risk) for name in ("per_exit", "uniform")]
    )
    if options.num_prompts:
        predicted, generated = pair
        figures["generation_within_interval"] = float(is_within(generated, predicted))
        found = (("predicted, teacher-forced", predicted), ("generated", generated))
        report.print_table("thresholds from all windows", [one.cells(name) for name, one in found])
        rows += [one.row(name) for name, one in found]
    report.write_json(options.json, rows, figures)


def _cells(name: str, rows: list[dict[str, Any]], risk: float) -> dict[str, str]:
    risks = [row[f"{name}_risk"] for row in rows]
    savings = [row[f"{name}_saving"] for row in rows]
    return {
        "thresholds": name.replace("_", " "),
        "mean risk": f"{statistics.fmean(risks):.4f}",
        "greatest risk": f"{max(risks):.4f}",
        "violations": f"{sum(one > risk for one in risks) / len(risks):.1%}",
        "mean saving": f"{statistics.fmean(savings):.2%}",
        "first thresholds": json.dumps(rows[0][f"{name}_thresholds"]),
    }


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except (ValueError, ee_llm.UserError) as error:
        sys.exit(f"calibration: {error}")
