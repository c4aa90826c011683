"""Measure the latency of one sequence over two pipeline stages, with and without exits.

    python tools/bench/decode_pipeline.py --thresholds 0.5 --json pp2.json [--quick]

A token that exits in the first stage does not wait for the second stage, which computes the token's
keys and values meanwhile. Ideally, tokens therefore arrive P / E times as fast as without exits,
where E is the mean number of stages that a token waits for (docs/reference/benchmarks.md).
decode.py also runs this benchmark.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.inference.execution.stage import partition_layers
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from tools.bench import report
from tools.bench.decode_model import excerpts, open_model
from tools.bench.ranks import run_ranks

NUM_STAGES = 2
QUICK = {"new_tokens": 32, "rounds": 3}


@dataclass(frozen=True)
class Options:
    """Decode one sequence over two pipeline stages, with and without exits."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Decode fewer tokens in fewer rounds. Explicit options take precedence."""
    checkpoint: Path = Path("runs/quickstart")
    """Decode with this model: a run directory or checkpoint with exits."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute with this precision; auto is the engine's default on this device."""
    thresholds: tuple[float | Literal["off"], ...] = (0.5,)
    """Exit if the top token has at least this probability; one value per exit, or one for all."""
    prompt_tokens: int = 32
    """Number of tokens in each prompt."""
    new_tokens: int = 96
    """Number of tokens to decode after each prompt."""
    rounds: int = 7
    """Number of prompts to decode, each with and without exits."""


@dataclass(frozen=True)
class Result:
    """Seconds of each round without and with exits, and the mean stages that a token waits for."""

    full: list[float]
    exact: list[float]
    mean_stages: float

    @property
    def speed_up(self) -> report.Ratio:
        """Return the speed-up with exits."""
        return report.ratio_of_medians(self.full, self.exact)

    @property
    def efficiency(self) -> float:
        """Return the speed-up divided by the ideal P / E."""
        return self.speed_up.value / (NUM_STAGES / self.mean_stages)


def mean_stages(config: Config, generations: Sequence[RequestOutput]) -> float:
    """Return the mean number of stages that the tokens waited for."""
    ends = [pieces[-1].last for pieces in partition_layers(config, NUM_STAGES)]
    exits = [exit for one in generations for exit in one.exits]
    return statistics.mean(1 + sum(exit > end for end in ends) for exit in exits)


def measure(options: Options) -> Result | None:
    """Return the result on the leading rank. Run this on one rank per stage."""
    torch.set_num_threads(1)
    model = open_model(options.checkpoint)
    config = model.config
    dtype = distributed.dtype_named(options.dtype)
    ranks = distributed.connect_serving(pipeline=NUM_STAGES, timeout_s=120)
    scheduler_config = SchedulerConfig(
        max_num_seqs=1, num_blocks=2 + config.model.max_seq_length // 16
    )
    engine = PipelineEngine(config, model.tensors, ranks, dtype, scheduler_config)
    if not ranks.is_leader:
        engine.worker_loop()
        return None
    thresholds = [None if value == "off" else value for value in options.thresholds]
    policy = make_exit_policy(config.exits.boundaries, thresholds)
    prompts = excerpts(model.text, options.rounds + 1, options.prompt_tokens)
    seconds: dict[str, list[float]] = {"full": [], "exact": []}
    outputs: list[RequestOutput] = []
    for number, prompt in enumerate(prompts):
        exact = Request("one", prompt, policy, SamplingParams(max_tokens=options.new_tokens))
        for strategy in ("full", "exact"):
            start = time.perf_counter()
            outputs += engine.generate([replace(exact, strategy=strategy)])
            if number > 0:  # the first prompt allocates
                seconds[strategy].append(time.perf_counter() - start)
    engine.close()
    ranks.shutdown()
    with_exits = [output for output in outputs if output.strategy == "exact"]
    return Result(seconds["full"], seconds["exact"], mean_stages(config, with_exits))


def main(options: Options) -> None:
    """Measure, print the table and write the figure."""
    result, *_ = run_ranks(NUM_STAGES, measure, options)
    row = {
        "stages": str(NUM_STAGES),
        "stages waited for": f"{result.mean_stages:.2f}",
        "P / E": f"{NUM_STAGES / result.mean_stages:.2f}",
        "speed-up": str(result.speed_up),
        "efficiency": f"{result.efficiency:.2f}",
        "ms / token": f"{1e3 * statistics.median(result.exact) / options.new_tokens:.2f}",
        "without exits": f"{1e3 * statistics.median(result.full) / options.new_tokens:.2f}",
    }
    report.print_table("one sequence over two pipeline stages", [row])
    report.write_json(options.json, [vars(result)], {"pp2_latency_efficiency": result.efficiency})


if __name__ == "__main__":
    main(report.read_options(Options, QUICK))
