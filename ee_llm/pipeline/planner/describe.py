"""Describe predictions: a grid and tables for people, JSON for scripts."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ee_llm.architecture.partition import exit_stage, stage_layers
from ee_llm.config import Config
from ee_llm.pipeline.planner.advise import Advice
from ee_llm.pipeline.planner.costs import Pieces, computed_share
from ee_llm.pipeline.planner.predict import Prediction, rank_memory
from ee_llm.pipeline.selection import select_fills
from ee_llm.pipeline.simulate import grid

MAX_RANKS = 16  # rows of the grid
MAX_CANDIDATES = 10  # rows of the table
MAX_STAGES = 16  # in a list of layers per stage


@dataclass(frozen=True)
class Clock:
    """The unit of times in the output: its name, and its length in the time of the costs."""

    unit: str
    scale: float

    def show(self, time: float, signed: bool = False) -> str:
        """Return a time as text, with its unit if that is short."""
        number = f"{time / self.scale:{'+' if signed else ''}.4g}"
        return f"{number} {self.unit}" if self.unit in ("s", "ms") else number


def clock_of(prediction: Prediction, in_seconds: bool) -> Clock:
    """Return the unit of times: seconds, milliseconds, or for nominal costs a forward pass."""
    if in_seconds:
        return Clock("s", 1.0) if prediction.simulation.makespan >= 1 else Clock("ms", 1e-3)
    config = prediction.config
    share = config.model.num_layers / config.parallel.pipeline
    name = f"forward passes of {share:g} layer{'s' if share != 1 else ''}"
    return Clock(name, share * prediction.pieces.layer.forward)


def schedule_name(prediction: Prediction) -> str:
    """Return the name of the schedule for readers."""
    parallel = prediction.config.parallel
    if parallel.schedule != "1f1b":
        exits = ", exits' weights deferred too" if prediction.plan.splits_exits else ""
        return f"zero bubble (ZB-H1{exits})"
    if parallel.virtual > 1:
        return f"interleaved 1F1B, {parallel.virtual} stages per rank"
    fills = [
        f"{count} in {part}"
        for part, count in (
            ("warm-up", parallel.fill_warmup),
            ("cool-down", parallel.fill_cooldown),
        )
        if count
    ]
    return f"1F1B, filled: {', '.join(fills)}" if fills else "1F1B"


def title(prediction: Prediction, clock: Clock) -> str:
    """Return the title of the picture: schedule, makespan and bubble share."""
    makespan = prediction.simulation.makespan / clock.scale
    name, unit = schedule_name(prediction), clock.unit
    return f"{name}: {makespan:.4g} {unit}, {100 * prediction.bubble_share:.1f} % idle"


def layout_lines(prediction: Prediction) -> str:
    """Return a line about the plan and a line about the placement of exits."""
    config = prediction.config
    split = [len(stage_layers(config, s)) for s in range(config.parallel.num_stages)]
    layers = f"{split[0]} each" if len(set(split)) == 1 else f"per stage {format_split(split)}"
    ranks, microbatches = prediction.plan.num_ranks, prediction.num_microbatches
    lines = [
        f"{schedule_name(prediction)}: {ranks} rank{'s' * (ranks > 1)}, "
        f"{microbatches} microbatch{'es' * (microbatches > 1)}, {config.model.num_layers} layers "
        f"({layers})"
    ]
    boundaries = config.exits.boundaries
    if boundaries:
        where = ", ".join(f"{b} on stage {exit_stage(config, b)}" for b in boundaries)
        lines.append(f"{config.exits.placement}-exits at boundary {where}")
    return "\n".join(lines)


def format_split(split: Sequence[int]) -> str:
    """Return layers per stage as text: 7-6-6-5, or for many stages 2x12-3x4 (twelve of 2, ...)."""
    if len(split) <= MAX_STAGES:
        return "-".join(map(str, split))
    runs = [(number, len(list(group))) for number, group in itertools.groupby(split)]
    return "-".join(f"{number}x{count}" if count > 1 else str(number) for number, count in runs)


def readable_grid(prediction: Prediction, width: int) -> str:
    """Return the rank x time grid in lines of at most `width`, and a note on omitted parts."""
    line = prediction.simulation.timeline
    lengths = [s.end - s.start for spans in line.ranks for s in spans if s.end > s.start]
    notes = []
    slot = min(lengths, default=1.0)
    coarse = statistics.median(lengths) / 3 if lengths else 1.0
    if slot < coarse:
        slot = coarse
        notes.append("columns are wider than the shortest actions, which may be hidden")
    rows = grid(line, slot).splitlines()
    if len(rows) > MAX_RANKS:
        half = MAX_RANKS // 2
        notes.append(f"ranks {half} to {len(rows) - half - 1} omitted")
        rows = [*rows[:half], "...", *rows[-half:]]
    cell = max(len(str(s.action)) for spans in line.ranks for s in spans) + 1
    label = max(row.index("  ") for row in rows if "  " in row) + 2
    longest = max(map(len, rows))
    if longest > width:
        columns = -(-(longest - label) // cell)
        kept = max(2, (width - label - 4) // cell)
        first, last = kept - kept // 2, kept // 2
        start, end = label + first * cell, label + (columns - last) * cell
        rows = [
            row if row == "..." else f"{row[:start].ljust(start)}... {row[end:]}" for row in rows
        ]
        notes.append(f"{columns - kept} of {columns} columns omitted")
    note = f"({'; '.join(notes)}: --picture shows all)" if notes else ""
    return "\n".join([*(row.rstrip() for row in rows), *([note] if note else [])])


def summary(prediction: Prediction, clock: Clock, logits: float) -> str:
    """Return the makespan, the time that exits add, and a table of the ranks."""
    simulation = prediction.simulation
    note = "" if clock.unit in ("s", "ms") else f"   (unit: {clock.unit})"
    lines = [
        f"makespan      {clock.show(simulation.makespan)}{note}",
        f"a microbatch  {clock.show(prediction.time_per_microbatch)}",
        f"idle          {100 * prediction.bubble_share:.1f} %",
    ]
    if prediction.config.exits.boundaries:
        share = prediction.exit_time / (simulation.makespan - prediction.exit_time)
        added = clock.show(prediction.exit_time, signed=True)
        lines.append(f"early exits   {added} ({100 * share:+.1f} % of the same plan without them)")
    if prediction.filling:
        lines.append(f"filling       {len(prediction.filling)} further microbatches in the bubbles")
    memory = rank_memory(prediction, logits)
    rows = [["rank", "stages", "idle", "live microbatches", "exit logits", "memory"]]
    for rank in range(prediction.plan.num_ranks):
        stages = prediction.stages_of(rank)
        rows.append(
            [
                str(rank),
                " ".join(map(str, stages)),
                f"{100 * simulation.bubble_share[rank]:.1f} %",
                " ".join(str(simulation.peak_activations[stage]) for stage in stages),
                " ".join(str(simulation.peak_exit_logits[stage]) for stage in stages),
                f"{memory[rank]:g}",
            ]
        )
    legend = (
        "peaks: live microbatches and exit logits, by stage; memory: in activations of one layer "
        f"for one\nmicrobatch, where the logits of an exit count as {logits:g}"
    )
    return "\n".join([*lines, "", table(rows), legend])


def notes(config: Config) -> list[str]:
    """Return lines about features of training whose times are means or are left out."""
    found = []
    exits, dropout = config.exits, config.layer_dropout
    mean = sum(computed_share(config, boundary) for boundary in exits.boundaries)
    if mean < len(exits.boundaries):
        found.append(
            f"early exits have their mean times: a step computes {mean:.3g} of "
            f"{len(exits.boundaries)} on average (exits.curriculum = {exits.curriculum})"
        )
    if dropout.max_probability > 0:
        found.append(
            "times include all layers, without what layer_dropout.max_probability = "
            f"{dropout.max_probability:g} saves"
        )
    return found


def candidates_table(candidates: Sequence[Advice], fitting: Sequence[Advice], clock: Clock) -> str:
    """Return a table of the best candidates, and their number."""
    rows = [["", "a microbatch", "idle", "memory", "schedule", "exits", "layers", "fills"]]
    for number, advice in enumerate(fitting[:MAX_CANDIDATES], 1):
        config = advice.prediction.config
        parallel = config.parallel
        name = parallel.schedule + (f" x {parallel.virtual}" if parallel.virtual > 1 else "")
        fills = select_fills(config)
        rows.append(
            [
                str(number),
                clock.show(advice.prediction.time_per_microbatch),
                f"{100 * advice.prediction.bubble_share:.1f} %",
                f"{advice.memory:g}",
                name,
                config.exits.placement if config.exits.boundaries else "",
                format_split(parallel.layer_split) or "even",
                "+".join(map(str, fills)) if any(fills) else "",
            ]
        )
    shown = f"the best {len(rows) - 1} of " if len(fitting) > len(rows) - 1 else ""
    lines = [f"{shown}{len(fitting)} plans, the best first:", table(rows)]
    if len(candidates) > len(fitting):
        lines.append(f"{len(candidates) - len(fitting)} more need more memory than --memory-limit")
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a table; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def format_pieces(pieces: Pieces) -> str:
    """Return the costs of all pieces in milliseconds: forward, backward, weight."""
    rows = {"layer": pieces.layer, "embedding": pieces.embedding, "exit": pieces.exit}
    rows["final exit"] = pieces.final
    shown = [f"{name} {', '.join(f'{1e3 * t:.3g}' for t in row)}" for name, row in rows.items()]
    return f"{'; '.join(shown)} ms (forward, backward, of which weight gradients)"


def as_json(
    prediction: Prediction, clock: Clock, logits: float, *, timeline: bool = True
) -> dict[str, Any]:
    """Return a prediction as JSON data, with times in the unit of the clock."""
    simulation, config = prediction.simulation, prediction.config
    figures: dict[str, Any] = {
        "schedule": config.parallel.schedule,
        "ranks": config.parallel.pipeline,
        "virtual": config.parallel.virtual,
        "layers": [len(stage_layers(config, s)) for s in range(config.parallel.num_stages)],
        "exits": list(config.exits.boundaries),
        "placement": config.exits.placement,
        "microbatches": prediction.num_microbatches,
        "fill_warmup": config.parallel.fill_warmup,
        "fill_cooldown": config.parallel.fill_cooldown,
        "unit": clock.unit,
        "makespan": simulation.makespan / clock.scale,
        "time_per_microbatch": prediction.time_per_microbatch / clock.scale,
        "exit_time": prediction.exit_time / clock.scale,
        "bubble_share": list(simulation.bubble_share),
        "peak_activations": list(simulation.peak_activations),
        "peak_exit_logits": list(simulation.peak_exit_logits),
        "memory": list(rank_memory(prediction, logits)),
        "notes": notes(config),
    }
    if timeline:
        figures["timeline"] = [
            [[str(s.action), s.start / clock.scale, s.end / clock.scale] for s in spans]
            for spans in simulation.timeline.ranks
        ]
    return figures
