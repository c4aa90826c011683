"""Measure the time and memory of training with early exits, relative to no exits.

    python tools/bench/train_overhead.py --json overhead.json [--quick]

Two real pipeline ranks are timed. Four ranks are simulated with costs measured in the same run;
their memory is counted in four real ranks. See docs/reference/benchmarks.md for the method.
"""

import itertools
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per rank

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ee_llm.config import Config
from ee_llm.errors import ConfigError
from ee_llm.pipeline import one_f_one_b, simulate
from ee_llm.pipeline.planner.costs import Pieces
from ee_llm.training.profile import measure_pieces, median_pieces, random_batch
from tools.bench import report
from tools.bench.overhead_runs import (
    FOUR_STAGES,
    TWO_STAGES,
    RankResult,
    Sizes,
    Variant,
    make_config,
    run_variants,
)
from tools.bench.ranks import run_ranks

# A round of single pieces is much shorter than a round of whole steps.
PIECE_ROUNDS = 4
QUICK = {"seq_length": 128, "micro_batch_size": 1, "num_microbatches": 4, "rounds": 3}


@dataclass(frozen=True)
class Options(Sizes):
    """Compare the time and memory of training with and without early exits."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Run fewer rounds on smaller microbatches, within a minute on two cores. Explicit options take
    precedence."""


def makespan(
    sizes: Sizes, variant: Variant, stages: int, pieces: Pieces, split: Sequence[int] = ()
) -> float:
    """Return the simulated seconds of the forward and backward passes of one step."""
    config = make_config(sizes, variant, stages, split)
    # Two ranks are simulated as they really run, for comparison.
    count = sizes.num_microbatches if stages == 2 else sizes.simulated_microbatches
    plan = one_f_one_b(stages, count)
    return simulate(plan, pieces.costs(config), deferred=variant.deferred).makespan


def best_split(sizes: Sizes, variant: Variant, stages: int, pieces: Pieces) -> tuple[int, ...]:
    """Return the layers per stage, at least one each, with the shortest simulated step."""
    inner = itertools.combinations(range(1, sizes.num_layers), stages - 1)
    ends = [(0, *boundaries, sizes.num_layers) for boundaries in inner]
    splits = [tuple(b - a for a, b in itertools.pairwise(end)) for end in ends]
    return min(splits, key=lambda split: makespan(sizes, variant, stages, pieces, split))


@dataclass(frozen=True)
class Row:
    """A row of the table. Ratios are relative to the standard model in the same layout."""

    layout: str
    variant: str
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    exit_bytes: int | None = None
    exit_bytes_ratio: float | None = None
    total_bytes: int | None = None
    total_bytes_ratio: float | None = None

    def cells(self) -> dict[str, str]:
        """Return the cells of the row in the table."""

        def size(count: int | None, ratio: float | None) -> str:
            return "" if count is None else f"{count / 2**20:.1f} MiB x {ratio:.3f}"

        return {
            "layout": self.layout,
            "variant": self.variant,
            "seconds": f"{self.seconds:.3f}",
            "time ratio [quartiles]": str(
                report.Ratio(self.ratio, self.ratio_low, self.ratio_high)
            ),
            "peak of exits": size(self.exit_bytes, self.exit_bytes_ratio),
            "peak of all activations": size(self.total_bytes, self.total_bytes_ratio),
        }


def real_rows(layout: str, ranks: Sequence[RankResult]) -> list[Row]:
    """Return a row per variant with the median time of the slowest rank."""
    seconds = {
        name: [max(round_) for round_ in zip(*(rank.steps[name] for rank in ranks), strict=True)]
        for name in ranks[0].steps
    }
    return [
        Row(
            layout,
            name,
            statistics.median(samples),
            *report.ratio_of_medians(samples, seconds["standard"]),
            *peaks(name, ranks),
        )
        for name, samples in seconds.items()
    ]


def simulated_rows(
    layout: str,
    seconds: Mapping[str, Callable[[Pieces], float]],
    rounds: Sequence[Pieces],
    ranks: Sequence[RankResult] = (),
) -> list[Row]:
    """Return a row per variant, simulated at median costs; quartiles are of single rounds."""
    standard = seconds["standard"]
    pieces = median_pieces(rounds)
    return [
        Row(
            layout,
            name,
            simulated(pieces),
            simulated(pieces) / standard(pieces),
            *report.quartiles([simulated(r) / standard(r) for r in rounds]),
            *peaks(name, ranks),
        )
        for name, simulated in seconds.items()
    ]


def peaks(name: str, ranks: Sequence[RankResult]) -> tuple[Any, ...]:
    """Return the peak bytes of exits and of all tensors, each with its ratio to standard."""
    if not ranks:
        return ()
    exits, exits_base = (max(r.exit_bytes[n] for r in ranks) for n in (name, "standard"))
    total, total_base = (max(r.total_bytes[n] for r in ranks) for n in (name, "standard"))
    return exits, exits / exits_base, total, total / total_base


def even(
    sizes: Sizes, wanted: Sequence[Variant], stages: int
) -> dict[str, Callable[[Pieces], float]]:
    """Return functions that simulate a step of each variant with an even layer split."""
    return {v.name: partial(makespan, sizes, v, stages) for v in wanted}


def balanced_rows(sizes: Sizes, rounds: Sequence[Pieces]) -> list[Row]:
    """Return simulated rows relative to a standard model on its fastest layer split."""
    pieces = median_pieces(rounds)
    standard, *_, both = FOUR_STAGES
    split = best_split(sizes, standard, 4, pieces)
    own_split = best_split(sizes, both, 4, pieces)
    seconds = {
        "standard": partial(makespan, sizes, standard, 4, split=split),
        "both, layers even": partial(makespan, sizes, both, 4),
        f"both, layers {_joined(own_split)}": partial(makespan, sizes, both, 4, split=own_split),
    }
    return simulated_rows(f"P=4 simulated, layers {_joined(split)}", seconds, rounds)


def _joined(split: Sequence[int]) -> str:
    return "-".join(map(str, split))


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    if options.num_layers % 4:
        raise ConfigError(f"--num-layers {options.num_layers} is not a multiple of the 4 stages.")
    two = run_ranks(2, run_variants, options, TWO_STAGES, 2, options.rounds)
    both = FOUR_STAGES[-1]
    config = make_config(options, both, 4)
    (measured,) = run_ranks(1, _measure_pieces, config, PIECE_ROUNDS * options.rounds)
    hop = max(rank.hop for rank in two)
    rounds = [replace(pieces, communication=hop) for pieces in measured]
    four = run_ranks(4, run_variants, options, FOUR_STAGES, 4, 0)

    simulated = simulated_rows("P=4 simulated", even(options, FOUR_STAGES, 4), rounds, four)
    rows = [
        *real_rows("P=2 real", two),
        *simulated_rows("P=2 simulated", even(options, TWO_STAGES, 2), rounds),
        *simulated,
        *balanced_rows(options, rounds),
    ]
    report.print_table(
        "training with early exits, relative to standard", [row.cells() for row in rows]
    )
    pieces = median_pieces(rounds)
    passes = statistics.median(two[0].passes["standard"])
    print(f"costs in ms (forward, backward): {_shown(pieces)}")
    print(f"P=2 standard, forward and backward passes only: {passes:.3f} s measured")
    by_name = {row.variant: row for row in simulated}
    figures = {
        f"{figure}_{label}": getattr(by_name[name], field)
        for label, name in (("naive", "naive"), ("best", "both"))
        for figure, field in (
            ("step_time_ratio", "ratio"),
            ("peak_bytes_ratio", "exit_bytes_ratio"),
            ("total_peak_bytes_ratio", "total_bytes_ratio"),
        )
    }
    report.write_json(options.json, [asdict(row) for row in rows], figures)


def _measure_pieces(config: Config, num_rounds: int) -> list[Pieces]:
    return measure_pieces(config, random_batch(config), num_rounds)


def _shown(pieces: Pieces) -> str:
    costs = {"layer": pieces.layer, "embedding": pieces.embedding, "exit": pieces.exit}
    costs["final exit"] = pieces.final
    shown = [f"{name} {1e3 * c.forward:.2f}, {1e3 * c.backward:.2f}" for name, c in costs.items()]
    return "; ".join([*shown, f"message {1e3 * pieces.communication:.2f}"])


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"train_overhead: {error}")
