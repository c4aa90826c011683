"""Compare the step times of pipeline schedules, measured in processes, with simulated times.

    python tools/bench/pipeline.py --json pipeline.json [--quick]

Every rank is a process whose stages sleep for the time that they would compute, so that more ranks
than cores can work concurrently. Everything else is real: the runtime, its messages and the
gradients. See docs/reference/benchmarks.md for the method and results.
"""

import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
import torch.distributed as dist

from ee_llm.distributed.point_to_point import Transport
from ee_llm.model.deferred_gradients import WeightGradients
from ee_llm.pipeline import Costs, PieceCost, Plan, Simulation, StageCost, lower, one_f_one_b
from ee_llm.pipeline import simulate as simulate_plan
from ee_llm.pipeline.runtime import MessageSpec, Runtime
from ee_llm.pipeline.schedules.bubble_filling import (
    cooldown_visits,
    filled_1f1b,
    max_fills,
    warmup_visits,
)
from ee_llm.pipeline.schedules.interleaved import interleaved
from ee_llm.pipeline.schedules.zero_bubble import zero_bubble_h1
from tools.bench import report
from tools.bench.ranks import run_ranks

TIMEOUT_S = 60.0
NUM_CHUNKS = 2
HIDDEN = MessageSpec((1, 4), torch.float32, torch.device("cpu"))
QUICK = {"rounds": 1, "forward_ms": 12.0}

BASE, FINAL, TWO_EXITS = "1F1B", "1F1B, final exit", "1F1B, two exits before it"
FIGURE_NAMES = {
    BASE: "1f1b",
    "filled, both": "filled",
    "interleaved": "interleaved",
    "ZB-H1": "zb",
}


@dataclass(frozen=True)
class Options:
    """Compare step times of pipeline schedules in processes with those of the simulation."""

    json: Path | None = None
    """Write the machine, rows and figures to this JSON file."""
    quick: bool = False
    """Run one round of shorter sleeps, within a minute. Explicit options take precedence."""
    ranks: tuple[int, ...] = (2, 4, 8)
    """Pipeline sizes to measure."""
    num_microbatches: int = 16
    """Number of microbatches per step, a multiple of all --ranks. Those in bubbles are extra."""
    forward_ms: float = 40.0
    """Duration of the forward pass of a rank's layers in ms. A backward pass takes twice as long,
    half of it for weight gradients. An exit takes half as long as the layers."""
    rounds: int = 5
    """Number of rounds; each measures all schedules in turn."""


@dataclass(frozen=True)
class Schedule:
    """A plan and the costs of its stages in seconds."""

    name: str
    plan: Plan
    stages: tuple[StageCost, ...]

    @cached_property
    def simulation(self) -> Simulation:
        """Return the simulation of the plan. Messages take no time."""
        return simulate_plan(self.plan, Costs(self.stages))


def schedules(num_ranks: int, num_microbatches: int, forward: float) -> list[Schedule]:
    """Return all schedules. Except for exits, the work of a microbatch is the same in each.

    Exits cost nothing, except in the two schedules that are named after them. With fewer than four
    ranks, no microbatch fits into the bubbles, and there are no two stages between the first and
    the last.
    """
    backward = 2 * forward
    free, exit_cost = (PieceCost(0.0, 0.0),), (PieceCost(forward / 2, backward / 2),)
    layers = StageCost(forward, backward, weight=backward / 2)
    plain = StageCost(forward, backward)
    with_exit = StageCost(forward, backward, exit_cost)
    chunk = StageCost(forward / NUM_CHUNKS, backward / NUM_CHUNKS)

    def ends(stage: StageCost, count: int = num_ranks) -> tuple[StageCost, ...]:
        last = StageCost(stage.forward, stage.backward, free, stage.weight)
        return (stage,) * (count - 1) + (last,)

    base = one_f_one_b(num_ranks, num_microbatches)
    found = [
        Schedule(BASE, base, ends(plain)),
        Schedule(
            "interleaved",
            interleaved(num_ranks, NUM_CHUNKS, num_microbatches),
            ends(chunk, num_ranks * NUM_CHUNKS),
        ),
        Schedule("ZB-H1", zero_bubble_h1(num_ranks, num_microbatches), ends(layers)),
    ]
    if num_ranks < 4:
        return found
    learning = (StageCost(forward, backward, free),) * num_ranks
    fills = max_fills(num_ranks, forward / backward)
    warmup = warmup_visits(num_ranks, fills, forward / backward, range(num_ranks))
    cooldown = cooldown_visits(num_ranks, fills, forward / backward)
    for part, visits in (
        ("warm-up", (warmup, ())),
        ("cool-down", ((), cooldown)),
        ("both", (warmup, cooldown)),
    ):
        plan = filled_1f1b(num_ranks, num_microbatches, *visits)
        found.append(Schedule(f"filled, {part}", plan, learning))
    middle = (num_ranks // 4, num_ranks // 2)
    final = (*(plain,) * (num_ranks - 1), with_exit)
    exits = tuple(with_exit if s in middle else cost for s, cost in enumerate(final))
    return [*found, Schedule(FINAL, base, final), Schedule(TWO_EXITS, base, exits)]


Span = tuple[float, float]  # start and end, in seconds of a clock that all processes share


class SleepingStage:
    """A stage that sleeps for the rest of its time and records when. Its gradients are real."""

    def __init__(self, cost: StageCost, *, is_last: bool) -> None:
        self.cost, self.is_last = cost, is_last
        width = HIDDEN.shape[-1]
        self.weight = torch.nn.Parameter(0.9 * torch.eye(width, dtype=HIDDEN.dtype))
        self.weight_gradients = WeightGradients()
        self.defers_weights = False
        self.spans: list[Span] = []

    def forward(
        self, microbatch: int, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
        """Return the output, and the same output for every exit."""
        start = time.monotonic()
        if hidden is None:
            hidden = torch.full(HIDDEN.shape, 1.0 + microbatch, dtype=HIDDEN.dtype)
        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()  # its hook marks the end of the backward pass
        output = self.weight_gradients.linear(hidden, self.weight)
        self._time_backward(output, hidden, self._layers_backward)
        self._sleep_until_over(start, self.cost.forward)
        return None if self.is_last else output, (output,) * len(self.cost.exits)

    def exit_loss(self, microbatch: int, index: int, tap: torch.Tensor) -> torch.Tensor:
        """Return the mean of the exit's input."""
        start = time.monotonic()
        cost = self.cost.exits[index]
        loss = tap.mean()
        self._time_backward(loss, tap, lambda: cost.backward)
        self._sleep_until_over(start, cost.forward)
        return loss

    @contextmanager
    def defer_weight_gradients(self) -> Iterator[Callable[[], None]]:
        """Defer weight gradients of the backward passes inside; yield a function that adds them."""

        def add_weights() -> None:
            start = time.monotonic()
            add()
            self._sleep_until_over(start, self.cost.weight)

        self.defers_weights = True
        try:
            with self.weight_gradients.defer() as add:
                yield add_weights
        finally:
            self.defers_weights = False

    def _layers_backward(self) -> float:
        return self.cost.backward - (self.cost.weight if self.defers_weights else 0.0)

    def _time_backward(
        self, output: torch.Tensor, source: torch.Tensor, seconds: Callable[[], float]
    ) -> None:
        # The backward pass lasts from the gradient of `output` to that of `source`.
        if output.requires_grad:
            starts: list[float] = []
            output.register_hook(lambda _: starts.append(time.monotonic()))
            source.register_hook(lambda _: self._sleep_until_over(starts.pop(), seconds()))

    def _sleep_until_over(self, start: float, seconds: float) -> None:
        # The few microseconds of real tensor operations count as work. Delays by the operating
        # system's scheduler are not compensated.
        if seconds > 0:
            time.sleep(max(0.0, start + seconds - time.monotonic()))
            self.spans.append((start, time.monotonic()))


@dataclass(frozen=True)
class RankResult:
    """The results of one rank by schedule: spans of each round, summed gradients of each stage."""

    spans: dict[str, list[list[Span]]]
    gradients: dict[str, dict[int, list[float]]]


def run_schedules(wanted: Sequence[Schedule], num_rounds: int) -> RankResult:
    """Run all schedules in turn on this rank. The first round does not count."""
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", timeout=timeout)
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        forward, backward = (dist.new_group(timeout=timeout) for _ in range(2))
        transport = Transport(range(size), forward, backward, TIMEOUT_S)
        stages = {s.name: _stages(s, rank) for s in wanted}
        runtimes = {
            s.name: Runtime(lower(s.plan), rank, stages[s.name], transport, HIDDEN) for s in wanted
        }
        spans: dict[str, list[list[Span]]] = {s.name: [] for s in wanted}
        for _ in range(num_rounds + 1):
            for name, runtime in runtimes.items():
                dist.barrier()
                runtime.step()
                spans[name].append([span for s in stages[name].values() for span in s.spans])
                for stage in stages[name].values():
                    stage.spans = []
        return RankResult(
            {name: rounds[1:] for name, rounds in spans.items()},
            {name: _gradients(own) for name, own in stages.items()},
        )
    finally:
        dist.destroy_process_group()


def _stages(schedule: Schedule, rank: int) -> dict[int, SleepingStage]:
    last = schedule.plan.num_stages - 1
    return {
        number: SleepingStage(schedule.stages[number], is_last=number == last)
        for number, owner in enumerate(schedule.plan.stage_ranks)
        if owner == rank
    }


def _gradients(stages: Mapping[int, SleepingStage]) -> dict[int, list[float]]:
    return {
        number: stage.weight.grad.flatten().tolist()
        for number, stage in stages.items()
        if stage.weight.grad is not None
    }


@dataclass(frozen=True)
class Row:
    """The results of one schedule on some ranks.

    `ratio` is the measured over the simulated time, with the quartiles of single rounds. A bubble
    share is the share of the ranks' time in which they are idle. `saved_*` is the share of 1F1B's
    idle time that this schedule removes.
    """

    ranks: int
    schedule: str
    simulated: float
    measured: float
    ratio: float
    ratio_low: float
    ratio_high: float
    bubble_simulated: float
    bubble_measured: float
    saved_simulated: float | None = None
    saved_measured: float | None = None

    def cells(self) -> dict[str, str]:
        """Return the cells of the row in the table."""

        def percent(simulated: float | None, measured: float | None) -> str:
            if simulated is None or measured is None:
                return ""
            return f"{100 * simulated:.1f} % / {100 * measured:.1f} %"

        return {
            "P": str(self.ranks),
            "schedule": self.schedule,
            "simulated s": f"{self.simulated:.3f}",
            "measured s": f"{self.measured:.3f}",
            "over simulated [quartiles]": str(
                report.Ratio(self.ratio, self.ratio_low, self.ratio_high)
            ),
            "bubble simulated / measured": percent(self.bubble_simulated, self.bubble_measured),
            "saved of 1F1B's": percent(self.saved_simulated, self.saved_measured),
        }


def makespan(ranks: Sequence[Sequence[Span]]) -> float:
    """Return the seconds from the first start of a span on any rank to the last end."""
    spans = [span for rank in ranks for span in rank]
    return max(end for _, end in spans) - min(start for start, _ in spans)


def bubble_share(ranks: Sequence[Sequence[Span]]) -> float:
    """Return the share of the ranks' time, from first start to last end, that they are idle."""
    busy = sum(end - start for rank in ranks for start, end in rank)
    return 1.0 - busy / (len(ranks) * makespan(ranks))


def make_row(schedule: Schedule, rounds: Sequence[Sequence[Sequence[Span]]]) -> Row:
    """Return the row of a schedule; each round has the spans of every rank."""
    seconds = [makespan(ranks) for ranks in rounds]
    simulated = schedule.simulation
    return Row(
        schedule.plan.num_ranks,
        schedule.name,
        simulated.makespan,
        statistics.median(seconds),
        *report.ratio_of_medians(seconds, [simulated.makespan] * len(seconds)),
        statistics.mean(simulated.bubble_share),
        statistics.median(map(bubble_share, rounds)),
    )


def with_savings(row: Row, base: Row) -> Row:
    """Return the row with its savings of idle time compared with `base`, the row of 1F1B."""
    simulated = row.bubble_simulated * row.simulated / (base.bubble_simulated * base.simulated)
    measured = row.bubble_measured * row.measured / (base.bubble_measured * base.measured)
    return Row(**asdict(row) | {"saved_simulated": 1 - simulated, "saved_measured": 1 - measured})


def measure(num_ranks: int, options: Options) -> list[Row]:
    """Return a row per schedule, measured on `num_ranks` processes."""
    wanted = schedules(num_ranks, options.num_microbatches, options.forward_ms / 1e3)
    results = run_ranks(num_ranks, run_schedules, wanted, options.rounds)
    by_rank = {s.name: [result.spans[s.name] for result in results] for s in wanted}
    rows = [make_row(s, list(zip(*by_rank[s.name], strict=True))) for s in wanted]
    # The schedules with exits that cost time are not comparable with the bubble of 1F1B.
    without_savings = (BASE, FINAL, TWO_EXITS)
    return [row if row.schedule in without_savings else with_savings(row, rows[0]) for row in rows]


def make_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Return the figures of the schedules that were measured, simulated and measured."""
    by_name = {(row.ranks, row.schedule): row for row in rows}
    worst = max((row.ratio for row in rows), key=lambda ratio: abs(ratio - 1))
    figures = {"measured_over_simulated_worst": worst}
    for schedule, label in FIGURE_NAMES.items():
        if (4, schedule) in by_name:
            row = by_name[4, schedule]
            figures[f"bubble_share_{label}_p4"] = row.bubble_simulated
            figures[f"bubble_share_{label}_p4_measured"] = row.bubble_measured
    pairs = [(row, by_name[row.ranks, FINAL]) for row in rows if row.schedule == TWO_EXITS]
    if pairs:
        ratios = [(r.simulated / b.simulated, r.measured / b.measured) for r, b in pairs]
        figures["two_exit_step_ratio"] = max(simulated for simulated, _ in ratios)
        figures["two_exit_step_ratio_measured"] = max(measured for _, measured in ratios)
    return figures


def main(options: Options) -> None:
    """Measure, print the table and write the figures."""
    rows = [row for num_ranks in options.ranks for row in measure(num_ranks, options)]
    title = f"pipeline steps of {options.num_microbatches} microbatches, measured over simulated"
    report.print_table(title, [row.cells() for row in rows])
    report.write_json(options.json, [asdict(row) for row in rows], make_figures(rows))


if __name__ == "__main__":
    try:
        main(report.read_options(Options, QUICK))
    except ValueError as error:
        sys.exit(f"pipeline: {error}")
