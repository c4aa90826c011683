"""Compare the time and memory of tuning exits with training the whole model.

    python tools/bench/tuning.py --json tuning.json [--quick]

Both alternate in one process. See docs/reference/benchmarks.md for the method and results.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.training.optimizer import build_optimizer, take_step
from ee_llm.training.parallel import ParallelModel
from ee_llm.training.profile import random_batch
from tools.bench import report
from tools.bench.live_bytes import LiveBytes

QUICK = {"seq_length": 128, "num_microbatches": 1, "rounds": 4}


class Case(NamedTuple):
    """The exits to tune and the layers of their heads."""

    boundaries: tuple[int, ...]
    head: tuple[str, ...]
    output: str


# The figures are those of the first case, EE-Tuning's head at the quick start's exits.
CASES = (
    Case((2, 4), ("mlp", "norm"), "own"),
    Case((2, 4), ("norm",), "own"),
    Case((2, 4), ("norm",), "shared"),
    Case((4, 7), ("mlp", "norm"), "own"),
    Case((4, 7), ("norm",), "shared"),
)


@dataclass(frozen=True)
class Options:
    """Compare a step that tunes two exits with a step that trains the whole model."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Use fewer and smaller batches, within a minute on two cores. Explicit options take
    precedence."""
    dtype: str = "float32"
    """Precision of both sides: float32 or bfloat16."""
    seq_length: int = 256
    """Number of tokens per sequence."""
    micro_batch_size: int = 4
    """Number of sequences per forward pass."""
    num_microbatches: int = 2
    """Number of microbatches per optimizer step."""
    rounds: int = 8
    """Number of steps to time on each side."""
    threads: int | None = None
    """Number of CPU threads; None uses all cores."""


def make_config(options: Options, case: Case, is_tuning: bool) -> Config:
    """Return the configuration of a case: the quick start's model, trained as a whole or tuned."""
    overrides: dict[str, object] = {
        "model.shape": "llama-tiny",
        "model.vocab_size": 4096,
        "exits.boundaries": case.boundaries,
        "exits.head": case.head,
        "exits.output": case.output,
        "data.seq_length": options.seq_length,
        "training.dtype": options.dtype,
        "training.micro_batch_size": options.micro_batch_size,
        "training.global_batch_size": options.micro_batch_size * options.num_microbatches,
    }
    if is_tuning:
        overrides["tuning.checkpoint"] = "not read: the values of weights do not affect the time"
        overrides["training.eval_interval"] = 0  # a validation would need all layers
    return load_config(None, overrides)


def flops(config: Config) -> float:
    """Return the floating-point operations of a step's passes for one token.

    A forward pass has 2 operations for each weight of a product, and 2 s for each layer and unit of
    the heads' total width, because causal attention reads half of the s positions. A backward pass
    takes twice as much for a trained product, the same for a frozen one, and nothing for a product
    through which no gradient flows.
    """
    model = config.model
    width = model.num_heads * model.head_dim
    groups = model.num_kv_heads * model.head_dim
    mlp = 2 * 3 * model.hidden_size * model.ffn_hidden_size
    projections = 2 * model.hidden_size * (2 * width + 2 * groups)
    layer = projections + mlp + 2 * config.data.seq_length * width
    output = 2 * model.hidden_size * model.vocab_size
    early = len(config.exits.boundaries)
    heads = 3 * early * mlp * ("mlp" in config.exits.head)
    if not config.is_tuning:
        return 3 * config.depth * layer + 3 * (early + 1) * output + heads
    passes = 3 if config.exits.output == "own" else 2
    return config.depth * layer + passes * early * output + heads


class Side:
    """A model and its optimizer, ready to take steps."""

    def __init__(self, config: Config, grid: distributed.Grid, num_microbatches: int) -> None:
        dtype = distributed.DTYPES[config.training.dtype]
        self.model = ParallelModel(config, grid, dtype)
        self.optimizer = build_optimizer(
            self.model.chunks, config.optimizer, data_size=1, dtype=dtype
        )
        self.batches = [random_batch(config)] * num_microbatches
        self.clip_grad = config.optimizer.clip_grad

    def step(self) -> None:
        """Take a step as ee-llm does."""
        self.model.forward_backward(self.batches, 0)
        take_step(self.optimizer, clip_grad=self.clip_grad)

    def kept_bytes(self) -> int:
        """Return the bytes of parameters, gradients and optimizer state, after a step."""
        tensors = [p for stage in self.model.stages for p in stage.parameters()]
        for chunk in self.model.chunks:
            tensors += [buffer.grad_data for buffer in chunk.buffers]
        for part in self.optimizer.chained_optimizers:
            inner = part.optimizer
            if inner is None:
                continue
            tensors += [p for group in inner.param_groups for p in group["params"]]
            tensors += [
                x for s in inner.state.values() for x in s.values() if isinstance(x, torch.Tensor)
            ]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values())


def peak_step_bytes(step: Callable[[], Any]) -> int:
    """Return the peak bytes of the tensors that a step creates, such as activations."""
    counter = LiveBytes()
    with counter:
        step()
    return counter.peak


def measure(options: Options, case: Case, grid: distributed.Grid) -> dict[str, Any]:
    """Return the row of a case: seconds and bytes of both sides, and the predicted ratio."""
    configs = {name: make_config(options, case, name == "tuned") for name in ("full", "tuned")}
    sides = {name: Side(c, grid, options.num_microbatches) for name, c in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-2, options.rounds):
        for name in sorted(sides, reverse=index % 2 == 1):
            distributed.synchronize()
            start = time.perf_counter()
            sides[name].step()
            distributed.synchronize()
            if index >= 0:  # the first rounds allocate and choose kernels
                seconds[name].append(time.perf_counter() - start)
    kept = {name: side.kept_bytes() for name, side in sides.items()}
    passing = {name: peak_step_bytes(side.step) for name, side in sides.items()}
    ratio = report.ratio_of_medians(seconds["tuned"], seconds["full"])
    return {
        "exits": list(case.boundaries),
        "head": list(case.head),
        "output": case.output,
        "predicted_step_time_vs_full": flops(configs["tuned"]) / flops(configs["full"]),
        "step_time_vs_full": ratio.value,
        "step_time_vs_full_low": ratio.low,
        "step_time_vs_full_high": ratio.high,
        "memory_vs_full": sum(b["tuned"] for b in (kept, passing))
        / sum(b["full"] for b in (kept, passing)),
        **{f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
        **{f"{name}_kept_bytes": value for name, value in kept.items()},
        **{f"{name}_passing_bytes": value for name, value in passing.items()},
    }


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    grid = distributed.initialize()
    rows = [measure(options, case, grid) for case in CASES]
    distributed.shutdown()
    title = (
        f"tuning two exits, relative to training llama-tiny, {options.dtype}, "
        f"{options.num_microbatches} x {options.micro_batch_size} x {options.seq_length} tokens"
    )
    report.print_table(title, [_cells(row) for row in rows])
    names = ("step_time_vs_full", "step_time_vs_full_low", "step_time_vs_full_high")
    figures = {name: rows[0][name] for name in (*names, "memory_vs_full")}
    figures["predicted_step_time_vs_full"] = rows[0]["predicted_step_time_vs_full"]
    figures["step_time_vs_full_most"] = max(row["step_time_vs_full"] for row in rows)
    report.write_json(options.json, rows, figures)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def mib(name: str) -> str:
        return (
            f"{row[f'full_{name}_bytes'] / 2**20:.0f} -> {row[f'tuned_{name}_bytes'] / 2**20:.0f}"
        )

    low, high = row["step_time_vs_full_low"], row["step_time_vs_full_high"]
    return {
        "exits, head, output": f"{row['exits']} {'-'.join(row['head'])} {row['output']}",
        "time over full [quartiles]": f"{row['step_time_vs_full']:.3f} [{low:.3f} .. {high:.3f}]",
        "by counting": f"{row['predicted_step_time_vs_full']:.3f}",
        "memory over full": f"{row['memory_vs_full']:.3f}",
        "parameters and state, MiB": mib("kept"),
        "created in a step, MiB": mib("passing"),
    }


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"tuning: {error}")
