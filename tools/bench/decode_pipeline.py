"""Latency of one sequence over two pipeline stages: what tokens gain that leave in the first.

    python tools/bench/decode_pipeline.py --thresholds 0.5 --json pp2.json [--quick]

A token that leaves at an exit of the first stage comes back without the second one, which fills in
its keys and values meanwhile. So one sequence is decoded P / E times as fast as without exits, if E
is the mean number of stages that a token waits for (docs/reference/benchmarks.md). decode.py runs
this too.
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
from tools.bench.decode_model import cut, open_model
from tools.bench.ranks import run_ranks

NUM_STAGES = 2
QUICK = {"new_tokens": 32, "rounds": 3}


@dataclass(frozen=True)
class Options:
    """One sequence over two pipeline stages, with exits and without."""

    json: Path | None = None
    """Where to write machine, rows and figures."""
    quick: bool = False
    """Fewer tokens and rounds. What is given beside it wins."""
    checkpoint: Path = Path("runs/quickstart")
    """Run directory or checkpoint of a model with exits."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision; auto is the engine's own choice for this device."""
    thresholds: tuple[float | Literal["off"], ...] = (0.5,)
    """Probability of the top token at which a token leaves: one for each exit, or one for all."""
    prompt_tokens: int = 32
    """Tokens of each prompt."""
    new_tokens: int = 96
    """Tokens that are decoded after each prompt."""
    rounds: int = 7
    """Prompts that are continued, each with exits and without, in turn."""


@dataclass(frozen=True)
class Result:
    """Seconds of each round without and with exits, and how many stages a token waits for."""

    full: list[float]
    exact: list[float]
    mean_stages: float

    @property
    def speed_up(self) -> report.Ratio:
        """Return how many times as fast tokens come with exits."""
        return report.ratio_of_medians(self.full, self.exact)

    @property
    def efficiency(self) -> float:
        """Return the speed-up over the P / E that it could be."""
        return self.speed_up.value / (NUM_STAGES / self.mean_stages)


def mean_stages(config: Config, generations: Sequence[RequestOutput]) -> float:
    """Return how many stages the tokens waited for, on average."""
    ends = [pieces[-1].last for pieces in partition_layers(config, NUM_STAGES)]
    exits = [exit for one in generations for exit in one.exits]
    return statistics.mean(1 + sum(exit > end for end in ends) for exit in exits)


def measure(options: Options) -> Result | None:
    """Return the result on the leading rank; to be run in as many ranks as there are stages."""
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
    prompts = cut(model.text, options.rounds + 1, options.prompt_tokens)
    seconds: dict[str, list[float]] = {"full": [], "exact": []}
    made: list[RequestOutput] = []
    for number, prompt in enumerate(prompts):
        exact = Request("one", prompt, policy, SamplingParams(max_tokens=options.new_tokens))
        for strategy in ("full", "exact"):
            start = time.perf_counter()
            made += engine.generate([replace(exact, strategy=strategy)])
            if number > 0:  # the first one allocates
                seconds[strategy].append(time.perf_counter() - start)
    engine.close()
    ranks.shutdown()
    left = [one for one in made if one.strategy == "exact"]
    return Result(seconds["full"], seconds["exact"], mean_stages(config, left))


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
