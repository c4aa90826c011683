"""Step time of training with layer dropout over training without it, and the share of layers kept.

    python tools/bench/layer_dropout.py --json layer_dropout.json [--quick]

One process takes steps of all sides in turn. How to read it: docs/reference/benchmarks.md.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.model.layer_dropout import drop_probabilities, kept_rows
from ee_llm.training.optimizer import take_step
from tools.bench import report
from tools.bench.tuning import Side, flops

QUICK = {"seq_length": 128, "rounds": 10}

# The figures are those of the last one, whose effect is larger than the noise of most machines.
PROBABILITIES = (0.0, 0.2, 0.5)


@dataclass(frozen=True)
class Options:
    """Time of a training step with layer dropout, over one without."""

    json: Path | None = None
    """Where to write machine, rows and figures."""
    quick: bool = False
    """Shorter sequences and fewer rounds: ends within a minute on two cores. Options given beside
    it take precedence."""
    dtype: str = "float32"
    """Precision of training: float32 or bfloat16."""
    shape: str = "llama-tiny"
    """Shape of the model (model.shape)."""
    seq_length: int = 256
    """Tokens in a sequence."""
    micro_batch_size: int = 4
    """Sequences in one forward pass."""
    num_microbatches: int = 2
    """Microbatches in one optimizer step."""
    rounds: int = 30
    """Timed steps of each side, in turn."""
    threads: int | None = None
    """Threads of this process on a CPU; torch's choice unless given."""


def make_config(options: Options, probability: float) -> Config:
    """Return the configuration of one side. Without dropout it is that of plain training."""
    return load_config(
        None,
        {
            "model.shape": options.shape,
            "model.vocab_size": 4096,
            "layer_dropout.max_probability": probability,
            "data.seq_length": options.seq_length,
            "training.dtype": options.dtype,
            "training.micro_batch_size": options.micro_batch_size,
            "training.global_batch_size": options.micro_batch_size * options.num_microbatches,
        },
    )


def expected_share(config: Config) -> float:
    """Return the expected share of the layer computations of a step that are kept."""
    return 1 - statistics.mean(drop_probabilities(config, 0))


def kept_share(config: Config, step: int) -> float:
    """Return the share of the layer computations of `step` that are kept."""
    rows, num_layers = config.training.micro_batch_size, config.model.num_layers
    samples = [
        range(first, first + rows) for first in range(0, config.training.global_batch_size, rows)
    ]
    kept = kept_rows(config, step, samples, range(1, num_layers + 1))
    dropped = sum(rows - len(indices) for microbatch in kept for indices in microbatch.values())
    return 1 - dropped / (rows * len(samples) * num_layers)


def share_of_layers(config: Config) -> float:
    """Return the layers' share of the floating-point operations of a step without dropout."""
    model = config.model
    output = 3 * 2 * model.hidden_size * model.vocab_size
    return 1 - output / flops(config)


def measure(options: Options) -> list[dict[str, Any]]:
    """Return a row for each probability: seconds of a step, and the shares of layers kept."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    grid = distributed.initialize()
    sides = {
        p: Side(make_config(options, p), grid, options.num_microbatches) for p in PROBABILITIES
    }
    seconds: dict[float, list[float]] = {p: [] for p in sides}
    cpu_seconds: dict[float, list[float]] = {p: [] for p in sides}
    for index in range(-2, options.rounds):
        for probability in sorted(sides, reverse=index % 2 == 1):
            side = sides[probability]
            distributed.synchronize()
            start, cpu_start = time.perf_counter(), time.process_time()
            side.model.forward_backward(side.batches, max(index, 0))
            take_step(side.optimizer, clip_grad=side.clip_grad)
            distributed.synchronize()
            if index >= 0:  # the first rounds allocate and choose kernels
                seconds[probability].append(time.perf_counter() - start)
                cpu_seconds[probability].append(time.process_time() - cpu_start)
    distributed.shutdown()
    rows = []
    for probability in PROBABILITIES:
        row = _row(sides[probability].model.config, seconds[probability], seconds[0.0])
        # Less sensitive to other load on the machine, and meaningless on a GPU.
        ratio = report.ratio_of_medians(cpu_seconds[probability], cpu_seconds[0.0])
        rows.append(row | {"cpu_time_ratio": ratio.value})
    return rows


def _row(config: Config, seconds: list[float], plain: list[float]) -> dict[str, Any]:
    ratio = report.ratio_of_medians(seconds, plain)
    expected = expected_share(config)
    return {
        "max_probability": config.layer_dropout.max_probability,
        "expected_ratio": expected,
        "kept_ratio": statistics.mean(kept_share(config, step) for step in range(len(seconds))),
        "predicted_time_ratio": 1 - share_of_layers(config) * (1 - expected),
        "time_ratio": ratio.value,
        "time_ratio_low": ratio.low,
        "time_ratio_high": ratio.high,
        "seconds": statistics.median(seconds),
    }


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    rows = measure(options)
    title = (
        f"training {options.shape} with layer dropout over training without, {options.dtype}, "
        f"{options.num_microbatches} x {options.micro_batch_size} x {options.seq_length} tokens"
    )
    report.print_table(title, [_cells(row) for row in rows])
    last = rows[-1]
    figures = {
        f"dropout_{name}": last[name]
        for name in (
            "time_ratio",
            "time_ratio_low",
            "time_ratio_high",
            "cpu_time_ratio",
            "expected_ratio",
            "kept_ratio",
            "predicted_time_ratio",
        )
    }
    report.write_json(options.json, rows, figures)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    low, high = row["time_ratio_low"], row["time_ratio_high"]
    return {
        "max_probability": f"{row['max_probability']:g}",
        "layers kept, expected": f"{row['expected_ratio']:.3f}",
        "layers kept": f"{row['kept_ratio']:.3f}",
        "time, by counting": f"{row['predicted_time_ratio']:.3f}",
        "time [quartiles]": f"{row['time_ratio']:.3f} [{low:.3f} .. {high:.3f}]",
        "processor time": f"{row['cpu_time_ratio']:.3f}",
        "seconds": f"{row['seconds']:.3f}",
    }


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"layer_dropout: {error}")
