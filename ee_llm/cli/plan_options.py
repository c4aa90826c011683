"""The options of `ee-llm plan`, as tyro reads and explains them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ee_llm.config.sections import Fills, Schedule

DEFAULT_LAYERS = 24
DEFAULT_WIDTH = 160


_COSTS = (
    "JSON file with the seconds that each piece takes for one microbatch: "
    '{"layer": [forward, backward, weight], "embedding": [forward, backward], '
    '"exit": [forward, backward, weight], "final": [forward, backward, weight], '
    '"communication": seconds}. weight is the part of backward that makes the weights\' gradients. '
    "Nominal costs are layer, exit and final 1, 2, 1, embedding and communication 0."
)
_ADVISE = (
    "Search layer split, placement, schedule, virtual and filling for the least time per ordinary "
    "microbatch, and show that plan. What is given is kept."
)


def _shown(default: str, metavar: str, text: str | None = None) -> Any:
    hint = f"(default: {default})"
    return tyro.conf.arg(help_behavior_hint=hint, metavar=metavar, help=text)


@dataclass(frozen=True)
class PlanOptions:
    """Show what a pipeline schedule does: who computes what when, its time, its memory.

    For example: ee-llm plan --stages 4 --microbatches 8 --exits 6,12 --picture plan.png

    Nothing is trained, and no GPU is needed. With --config the plan is the one that 'ee-llm train'
    would run; options given beside it win.
    """

    stages: Annotated[int | None, _shown("the configuration's", "INT")] = None
    """Pipeline ranks (parallel.pipeline). Needed without --config."""

    microbatches: Annotated[int | None, _shown("the configuration's", "INT")] = None
    """Microbatches in one step of one data-parallel rank. Needed without --config."""

    nproc: Annotated[int | None, _shown("those of one data-parallel rank", "INT")] = None
    """Processes of the run that --config describes; data-parallel ranks share its microbatches."""

    layers: Annotated[int | None, _shown(f"the configuration's, else {DEFAULT_LAYERS}", "INT")] = (
        None
    )
    """Number of transformer layers (model.num_layers)."""

    exits: Annotated[
        tuple[int, ...] | None, _shown("the configuration's, else none", "INT [INT ...]")
    ] = None
    """Boundaries of the early exits (exits.boundaries), as in 6 12 or 6,12."""

    placement: Annotated[
        Literal["post", "pre"] | None, _shown("the configuration's, else post", "post|pre")
    ] = None
    """Whether an exit at boundary b is on the stage of layer b or on that of layer b+1."""

    schedule: Annotated[
        Schedule | None,
        _shown("the configuration's, else 1f1b", "1f1b|zero-bubble|zero-bubble-exits"),
    ] = None
    """Order of forward and backward passes (parallel.schedule)."""

    virtual: Annotated[int | None, _shown("the configuration's, else 1", "INT")] = None
    """Stages of each rank (parallel.virtual); more than 1 interleaves them."""

    layer_split: Annotated[
        tuple[int, ...] | None, _shown("the configuration's, else even", "INT [INT ...]")
    ] = None
    """Layers of each stage, first to last (parallel.layer_split), as in 7 6 6 5 or 7,6,6,5."""

    fill: Annotated[Fills | None, _shown("none", "INT|auto")] = None
    """--fill-warmup and --fill-cooldown at once; what is given of them wins."""

    fill_warmup: Annotated[Fills | None, _shown("the configuration's, else 0", "INT|auto")] = None
    """Further microbatches that fill the wait for the first gradient; auto is as many as useful."""

    fill_cooldown: Annotated[Fills | None, _shown("the configuration's, else 0", "INT|auto")] = None
    """Further microbatches that fill the drain of the pipeline; auto is as many as useful."""

    config: Annotated[Path | None, _shown("none", "FILE")] = None
    """TOML file of a training run whose plan to show."""

    costs: Annotated[Path | None, _shown("nominal", "FILE", _COSTS)] = None

    profile: bool = False
    """Measure the costs of --config's model on this device instead; communication counts as 0."""

    costs_output: Annotated[Path | None, _shown("none", "FILE")] = None
    """Where to write the costs that were measured, for --costs."""

    picture: Annotated[Path | None, _shown("none", "FILE")] = None
    """Where to draw the plan: .png or .svg."""

    trace: Annotated[Path | None, _shown("none", "FILE")] = None
    """Where to write the plan for chrome://tracing and ui.perfetto.dev."""

    json: Annotated[Path | None, _shown("none", "FILE")] = None
    """Where to write all figures; - prints them and nothing else."""

    advise: Annotated[bool, tyro.conf.arg(help=_ADVISE)] = False

    memory_limit: Annotated[float | None, _shown("none", "FLOAT")] = None
    """With --advise: the most a rank may hold, in activations of one layer for one microbatch."""

    logits_size: float = 1.0
    """What one exit's logits for one microbatch take, in the same unit."""

    width: Annotated[int | None, _shown(f"the terminal's, else {DEFAULT_WIDTH}", "INT")] = None
    """Longest line of the grid, in characters."""
