"""Compare exits that a learned gate decides with exits that the highest probability decides.

    python tools/bench/gates.py --json gates.json --checkpoint runs/tuned --data data/own
    python tools/bench/gates.py --json gates.json --quick

Gates are trained on the start of the text if the checkpoint has none. On the rest, thresholds of
both measures are found that disagree with the final exit for the same share of tokens, --risk.
Then both generate from the same prompts, in turns. See docs/reference/benchmarks.md.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ee_llm
from ee_llm.checkpoint.gates import gated_exits, write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.data.windows import Windows
from ee_llm.evaluation.calibration.gate_training import GateTraining, gates_of
from ee_llm.evaluation.calibration.options import CalibrateOptions
from ee_llm.evaluation.calibration.search import Costs, find_path
from ee_llm.evaluation.text_pass import run_pass
from ee_llm.inference.choices import Measure
from tools.bench import report
from tools.bench.exit_records import collect_exits
from tools.bench.small_model import small_model

QUICK = {
    "gate_tokens": 8_000,
    "num_tokens": 14_000,
    "seq_length": 64,
    "prompt_length": 24,
    "risk": 0.01,
    "temperature": 1.0,
}
"""Defaults with --quick, which trains a small model of its own.

Its greedy text repeats itself and leaves at the first exit; sampled text is like the data.
"""
MEASURES: tuple[Measure, ...] = ("max_probability", "gate")


@dataclass(frozen=True)
class Options:
    """Compare gates with the highest probability at equal agreement."""

    json: Path | None = None
    """File to write the machine, rows and figures to."""
    quick: bool = False
    """Run on a small model that is trained first, within about two minutes."""
    checkpoint: Path | None = None
    """Checkpoint with exits."""
    data: str | None = None
    """Prefix of prepared text that did not train the exits."""
    exits: tuple[int, ...] = ()
    """Exits that may have a threshold. (default: all)"""
    gate_tokens: int = 30_000
    """Number of tokens that train the gates, from the start of the text."""
    num_tokens: int = 50_000
    """Number of tokens of the text, with those."""
    seq_length: int = 128
    """Length of a window."""
    risk: float = 0.1
    """Share of tokens that disagree with the final exit."""
    num_prompts: int = 16
    """Number of prompts to continue, from the end of the text."""
    prompt_length: int = 32
    """Length of a prompt in tokens."""
    max_tokens: int = 48
    """Number of tokens to generate."""
    temperature: float = 0.0
    """Temperature of the sampling; 0 is greedy."""
    batch_size: int = 1
    """Number of sequences that run at once."""
    rounds: int = 5
    """Number of rounds, in which both generate in turns."""
    head_cost: float | None = None
    """Cost of a head in layers. (default: the ratio of their weights)"""


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
    )


def find_policies(options: Options, checkpoint: Path, data: str) -> list[dict[str, Any]]:
    """Return a row with the policy of each measure that reaches the same agreement."""
    given = calibrate_options(options, checkpoint, data)
    reader = TensorReader(checkpoint)
    if gated_exits(reader) != set(reader.config().exits.boundaries):
        trained = run_pass(
            replace(given, num_tokens=options.gate_tokens),
            "training gates",
            lambda config: GateTraining(config, 0),
        )
        assert trained is not None, "one process runs the model"
        gates = gates_of(trained.found)
        write_gates(reader, {name: one for gate in gates for name, one in gate.tensors.items()})
    rows = []
    for measure in MEASURES:
        collector = collect_exits(replace(given, measure=measure), options.gate_tokens)
        records, costs = collector.records(), collector.costs
        head = costs.head if options.head_cost is None else options.head_cost
        costs = Costs(costs.boundaries, costs.num_layers, head, measure)
        is_used = torch.tensor([not options.exits or b in options.exits for b in costs.boundaries])
        records = replace(records, confidence=records.confidence.where(is_used[:, None], 0.0))
        # Without the costs of heads, so that both measures may use the same exits.
        free = Costs(costs.boundaries, costs.num_layers, 0.0, measure)
        path = [one for one in find_path(records, free, options.risk) if one.loss <= options.risk]
        best = min(path, key=lambda one: one.cost)
        outcome = records.outcome(best.thresholds)
        rows.append(
            {
                "measure": measure,
                "policy": ee_llm.ExitPolicy(costs.boundaries, best.thresholds, measure),
                "predicted_disagreement": best.loss,
                "predicted_depth": best.cost,
                "predicted_heads": float(costs.heads(best.thresholds)[outcome.exits].mean()),
                "predicted_cost": float(costs.of(outcome.exits, best.thresholds).mean()),
                "full_cost": costs.full,
            }
        )
    return rows


def generate(options: Options, checkpoint: Path, data: str, rows: list[dict[str, Any]]) -> None:
    """Add what generations of each policy measure to its row: their speed, depth and heads."""
    windows = [
        w for w in Windows([data], options.seq_length, None) if len(w) > options.prompt_length
    ]
    chosen = windows[-options.num_prompts :]
    prompts = [window[: options.prompt_length].tolist() for window in chosen]
    params = ee_llm.SamplingParams(
        max_tokens=options.max_tokens, ignore_eos=True, temperature=options.temperature, seed=0
    )
    with ee_llm.LLM(checkpoint, dtype="float32", max_num_seqs=options.batch_size) as llm:
        policies = [row["policy"] for row in rows] + ["off"]
        seconds: list[list[float]] = [[] for _ in policies]
        for number in range(options.rounds + 1):  # The first round warms up.
            for policy, taken in zip(policies, seconds, strict=True):
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, exits=policy)
                if number:
                    taken.append(time.perf_counter() - start)
                for row in rows:
                    if row["policy"] is policy:
                        row["exits"] = [exit for one in outputs for exit in one.exits]
    for row, taken in zip(rows, seconds, strict=False):
        policy, exits = row["policy"], row.pop("exits")
        costs = Costs(policy.boundaries, llm.config.model.num_layers, 0.0, policy.measure)
        ends = (*policy.boundaries, costs.num_layers)
        heads = dict(zip(ends, costs.heads(policy.thresholds).tolist(), strict=True))
        row["depth"] = sum(exits) / len(exits)
        row["heads"] = sum(heads[exit] for exit in exits) / len(exits)
        row["seconds"] = taken
        row["speedup_over_full"] = report.ratio_of_medians(seconds[-1], taken)
        row["thresholds"] = policy.thresholds


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures."""
    probability, gate = rows
    return {
        "gate_heads_per_token": gate["heads"],
        "gate_speed_ratio": report.ratio_of_medians(probability["seconds"], gate["seconds"]).value,
        "gate_depth_difference": gate["predicted_depth"] - probability["predicted_depth"],
        "gate_speedup_over_full": gate["speedup_over_full"].value,
    }


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    with tempfile.TemporaryDirectory() as name:
        checkpoint, data = options.checkpoint, options.data
        if checkpoint is None or data is None:
            if not options.quick or checkpoint is not None or data is not None:
                raise ValueError("give --checkpoint and --data, or --quick without them")
            # Heads that cost as much as some layers, as in real models.
            checkpoint, _, data = small_model(Path(name), (2, 4), vocab_size=4096)
        rows = find_policies(options, checkpoint, data)
        generate(options, checkpoint, data, rows)
    title = f"at most {options.risk:.1%} of tokens disagree with the final exit"
    report.print_table(title, [_cells(row) for row in rows])
    figures = figures_of(rows)
    for row in rows:
        del row["policy"]
    report.write_json(options.json, rows, figures)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "measure": row["measure"],
        "disagree": f"{row['predicted_disagreement']:.3%}",
        "depth": f"{row['predicted_depth']:.2f}",
        "heads": f"{row['predicted_heads']:.2f}",
        "generated: depth": f"{row['depth']:.2f}",
        "heads ": f"{row['heads']:.2f}",
        "speed-up over full": str(row["speedup_over_full"]),
    }


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except (ValueError, ee_llm.UserError) as error:
        sys.exit(f"gates: {error}")
