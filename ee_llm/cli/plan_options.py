"""The options and help of `ee-llm plan`, and checks of the options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.config.limits import MAX_BATCH_SIZE, MAX_FACTOR, MAX_LAYERS, MAX_RANKS
from ee_llm.config.sections import Fills, Schedule
from ee_llm.errors import UserError
from ee_llm.output_files import check_writable
from ee_llm.pipeline.planner.picture import check_suffix

DEFAULT_LAYERS = 24
WRITTEN = ("picture", "trace", "costs_output", "json")
"""The options that name a file to write."""

COMMAND = CommandHelp(
    "plan",
    """Show a pipeline schedule: the actions of each rank, the time and the memory.

    This trains nothing and needs no GPU. With --config, it shows the schedule of 'ee-llm train'
    with this file; options here take precedence over the file. Without --config, --stages and
    --microbatches are required.""",
    (
        Group("Run", "config stages microbatches", "nproc"),
        Group("Model", "layers exits", "placement layer_split"),
        Group("Schedule", "schedule virtual fill", "fill_warmup fill_cooldown"),
        Group("Costs", "", "costs profile costs_output logits_size"),
        Group("Search", "advise memory_limit"),
        Group("Output", "picture json", "trace width"),
    ),
    (
        "ee-llm plan --config train.toml",
        "ee-llm plan --stages 4 --microbatches 8 --exits 6,12 --picture plan.png",
        "ee-llm plan --stages 4 --microbatches 8 --exits 6,12 --advise --memory-limit 30",
    ),
)


@dataclass(frozen=True)
class PlanOptions:
    """The options of `ee-llm plan`."""

    stages: int | None = None
    """Number of pipeline ranks (parallel.pipeline). (default: that of --config)"""

    microbatches: int | None = None
    """Number of microbatches in one step of one data-parallel rank. (default: that of --config)"""

    nproc: int | None = None
    """Number of processes of the run in --config. Its data-parallel ranks share the microbatches.
    (default: the processes of one data-parallel rank)"""

    layers: int | None = None
    """Number of transformer layers (model.num_layers). (default: that of --config, else 24)"""

    exits: tuple[int, ...] | Literal["all"] | None = None
    """Boundaries of the early exits (exits.boundaries), or all. (default: those of --config, else
    none)"""

    placement: Literal["post", "pre"] | None = None
    """Stage of the exit at boundary b: post is the stage of layer b, pre the stage of layer b+1.
    (default: that of --config, else post)"""

    schedule: Schedule | None = None
    """Order of forward and backward passes (parallel.schedule). (default: that of --config, else
    1f1b)"""

    virtual: int | None = None
    """Number of stages on each rank (parallel.virtual); more than 1 interleaves them. (default:
    that of --config, else 1)"""

    layer_split: tuple[int, ...] | None = None
    """Number of layers of each stage, first to last (parallel.layer_split). (default: that of
    --config, else an even split)"""

    fill: Fills | None = None
    """Set --fill-warmup and --fill-cooldown to this, unless they are given."""

    fill_warmup: Fills | None = None
    """Number of additional microbatches that fill the warm-up bubble; auto is the largest useful
    number. (default: that of --config, else 0)"""

    fill_cooldown: Fills | None = None
    """Number of additional microbatches that fill the cool-down bubble; auto is the largest useful
    number. (default: that of --config, else 0)"""

    config: Path | None = None
    """Show the schedule of the training run in this TOML file."""

    costs: Path | None = None
    """Read the seconds of each piece for one microbatch from this JSON file: {"layer": [forward,
    backward, weight], "embedding": [forward, backward], "exit": [forward, backward, weight],
    "final": [forward, backward, weight], "communication": time}. weight is the part of backward
    that computes the gradients of weights. (default: layer, exit and final 1, 2, 1; embedding and
    communication 0)"""

    profile: bool = False
    """Measure the costs of the model in --config on this device. Communication counts as 0."""

    costs_output: Path | None = None
    """Write the costs that --profile measures to this file, for --costs."""

    picture: Path | None = None
    """Draw the schedule to this .png or .svg file."""

    trace: Path | None = None
    """Write the schedule to this file, for chrome://tracing and ui.perfetto.dev."""

    json: Path | None = None
    """Write all figures to this file as JSON; - prints them and nothing else."""

    advise: bool = False
    """Search the layer split, placement, schedule, virtual and filling for the least time per
    ordinary microbatch, and show the best schedule. Options that are given do not change."""

    memory_limit: float | None = None
    """Limit the memory of a rank in the search of --advise, in activations of one layer for one
    microbatch."""

    logits_size: float = 1.0
    """Memory of the logits of one exit for one microbatch, in activations of one layer for one
    microbatch."""

    width: int | None = None
    """Maximum width of the grid in characters. (default: that of the terminal, else 160)"""


_MAXIMA = {
    "stages": MAX_RANKS,
    "microbatches": MAX_BATCH_SIZE,
    "nproc": MAX_RANKS,
    "layers": MAX_LAYERS,
    "virtual": MAX_RANKS,
    "width": 100_000,  # characters, more than any line in a terminal or file has
}


def check(options: PlanOptions) -> None:
    """Raise UserError for options that are out of range or contradict each other."""
    for name, maximum in _MAXIMA.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= maximum:
            raise UserError(f"--{name} {value} is out of range. Use 1 to {maximum:,}.")
    if options.profile and options.config is None:
        raise UserError("--profile measures the model of a configuration. Give --config FILE.")
    if options.profile and options.costs is not None:
        raise UserError(
            f"--profile measures costs, but --costs {options.costs} gives them. Remove one of the "
            "two."
        )
    if options.costs_output is not None and not options.profile:
        raise UserError(
            f"--costs-output {options.costs_output} requires --profile, which measures costs. Add "
            "--profile, or remove --costs-output."
        )
    if options.memory_limit is not None and not options.advise:
        raise UserError(
            f"--memory-limit {options.memory_limit:g} limits the search of --advise. "
            "Add --advise, or remove --memory-limit."
        )
    if options.memory_limit is not None and not options.memory_limit > 0:
        raise UserError(
            f"--memory-limit {options.memory_limit:g} is out of range. Use a number above 0."
        )
    if not 0 <= options.logits_size <= MAX_FACTOR:
        raise UserError(
            f"--logits-size {options.logits_size} is out of range. Use 0 to {MAX_FACTOR:,.0f}."
        )
    if options.nproc is not None and options.config is None:
        raise UserError(
            f"--nproc {options.nproc} requires the configuration of a run. Add --config FILE, or "
            "remove --nproc."
        )
    if options.nproc is not None and options.microbatches is not None:
        raise UserError(
            f"--nproc {options.nproc} and --microbatches {options.microbatches} both determine "
            "the number of microbatches. Remove one of the two."
        )
    if options.picture is not None:
        check_suffix(options.picture)
    for name in WRITTEN:
        check_writable(f"--{name.replace('_', '-')}", getattr(options, name))
