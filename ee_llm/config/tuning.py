"""EE-Tuning's section of the configuration, and what has to agree with it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ee_llm.config.base import Integers, PathText, Section, option

if TYPE_CHECKING:
    from ee_llm.config import Config

DEFAULT_SEQ_LENGTH = 2048
"""Longest sequence, in tokens, that a model is tuned on unless more is asked for.

The time and memory of attention grow with the square of the length, and a model's context may have
a million tokens.
"""


class TuningConfig(Section):
    """EE-Tuning (`ee-llm tune`): exits are trained, all else stays as a checkpoint has it."""

    checkpoint: PathText | None = option(
        None,
        "Checkpoint, or run directory, with the model whose exits are tuned.",
        shown="none",
        min_length=1,
    )
    exits: Integers = option(
        (),
        "Boundaries of the exits that are trained. Others of exits.boundaries stay as they are and "
        "are neither loaded nor computed; nor are layers behind the last one trained.",
        shown="exits.boundaries",
    )


def tuning_problems(config: "Config") -> Iterator[str]:
    """Yield a line for each option that does not go with the tuning that is asked for."""
    tuning = config.tuning
    if not config.is_tuning:
        if tuning.exits:
            yield (
                f"tuning.exits = {list(tuning.exits)} has no effect without tuning.checkpoint; "
                "give both for ee-llm tune, or neither"
            )
        return
    yield from _exits(config)
    yield from _nothing_to_train(config)
    parallel = config.parallel
    for name, plain in (("virtual", 1), ("schedule", "1f1b"), ("fill_warmup", 0)):
        yield from _needs_no(config, f"parallel.{name}", getattr(parallel, name), plain)
    yield from _needs_no(config, "parallel.fill_cooldown", parallel.fill_cooldown, 0)
    if config.checkpoint.initial is not None:
        yield (
            f"checkpoint.initial = {config.checkpoint.initial} beside tuning.checkpoint = "
            f"{tuning.checkpoint}: both say what to begin with; leave the first out"
        )


def _exits(config: "Config") -> Iterator[str]:
    boundaries, tuned = config.exits.boundaries, config.tuning.exits
    if not boundaries:
        yield (
            f"exits.boundaries = [] and tuning.checkpoint = {config.tuning.checkpoint}: there is "
            "no exit to tune; name one or more"
        )
    elif not set(tuned) <= set(boundaries) or list(tuned) != sorted(set(tuned)):
        mend = sorted(set(tuned) & set(boundaries)) or list(boundaries)
        yield (
            f"tuning.exits = {list(tuned)} must increase and name exits of exits.boundaries = "
            f"{list(boundaries)}, for example {mend}"
        )


def _nothing_to_train(config: "Config") -> Iterator[str]:
    exits = config.exits
    if not exits.head and exits.output != "own":
        yield (
            f"exits.head = [] with exits.output = {exits.output} leaves nothing to train: that "
            "output weight is the frozen model's; set exits.output = own, or give exits.head a "
            "norm, mlp or block"
        )
    weights = dict(zip(exits.boundaries, exits.weights, strict=False))
    tuned = [weights.get(boundary) for boundary in config.tuning.exits]
    if tuned and not any(tuned) and exits.weight_schedule == "constant":
        yield (
            f"exits.weights = {list(exits.weights)} are 0 for all of tuning.exits = "
            f"{list(config.tuning.exits)}, which leaves nothing to train; give one a weight"
        )


def _needs_no(config: "Config", name: str, value: object, plain: object) -> Iterator[str]:
    if value != plain:
        yield (
            f"{name} = {value} is about the backward passes of a whole model, and with "
            f"tuning.checkpoint = {config.tuning.checkpoint} there are none; set it to {plain}"
        )
