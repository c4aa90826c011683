"""The learning rate and the exits' loss weights as pure functions of the step.

Checkpoints therefore need no scheduler state.
"""

import math
from typing import Protocol

from ee_llm.config import Config
from ee_llm.errors import UserError
from ee_llm.losses.curricula import depth_weights, enabled_exits
from ee_llm.losses.exit_losses import scheduled_weight

SCHEDULES = ("cosine", "linear", "constant", "wsd")


class ScheduleOptions(Protocol):
    """The options of the optimizer's configuration that the schedule reads."""

    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_steps(self) -> int | None: ...
    @property
    def wsd_decay_steps(self) -> int: ...


def learning_rate(step: int, options: ScheduleOptions, total_steps: int) -> float:
    """Return the learning rate of `step` (from 1) in a run of `total_steps` steps.

    During the warm-up the rate is lr * step / warmup_steps. After it, the rate is a function of
    u = (step - 1 - warmup_steps) / (end - warmup_steps) with end = `decay_steps` (by default
    `total_steps`):

    - cosine: min_lr + (lr - min_lr) * (1 + cos(pi u)) / 2 (Loshchilov and Hutter, 1608.03983)
    - linear: lr - (lr - min_lr) * u
    - constant: lr
    - wsd: lr up to `wsd_decay_steps` before the end, then linear (MiniCPM, 2404.06395)

    After `end` every decaying schedule stays at `min_lr`. As in Megatron-LM and torchtitan, this
    rate is reached after step `end`, so that the last step trains even if `min_lr` is 0, and so
    does a run of one step.

    Raises:
        UserError: The schedule is unknown, or the step is below 1.
    """
    if step < 1:
        raise UserError(f"step = {step} is below 1. Count steps from 1.")
    if options.schedule not in SCHEDULES:
        raise UserError(
            f"optimizer.schedule = {options.schedule!r} is not a schedule. Use one of "
            f"{', '.join(SCHEDULES)}."
        )
    if step < options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.schedule == "constant":
        return options.lr
    end = total_steps if options.decay_steps is None else options.decay_steps
    start = options.warmup_steps
    if options.schedule == "wsd":
        start = max(start, end - options.wsd_decay_steps)
    if step > end:
        return options.min_lr
    if step - 1 <= start:
        return options.lr
    progress = (step - 1 - start) / (end - start)
    if options.schedule == "cosine":
        return (
            options.min_lr + (options.lr - options.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        )
    return options.lr - (options.lr - options.min_lr) * progress


def wasted_steps(options: ScheduleOptions, total_steps: int) -> str:
    """Return a warning if the learning rate of the last steps of a run is 0, otherwise ""."""
    end = options.decay_steps
    if end is None or end >= total_steps or learning_rate(total_steps, options, total_steps) > 0:
        return ""
    return (
        f"steps {end + 1} to {total_steps} train nothing: with optimizer.decay_steps = {end} their "
        "learning rate is optimizer.min_lr = 0. Set optimizer.min_lr, or omit "
        "optimizer.decay_steps."
    )


def exit_weights(config: Config, step: int) -> dict[int, float]:
    """Return the loss weights at `step` (from 0) of the exits that the step computes, by boundary.

    With `exits.weighting = "weights"` these are all exits to train, and the final exit has weight
    1.
    """
    weights = _weights_of_all(config, step)
    return {boundary: weights[boundary] for boundary in weights if boundary in config.trained_exits}


def _weights_of_all(config: Config, step: int) -> dict[int, float]:
    exits, num_layers = config.exits, config.model.num_layers
    if exits.weighting == "depth":
        boundaries = (*exits.boundaries, num_layers)
        enabled = enabled_exits(
            exits.curriculum,
            step,
            len(boundaries),
            config.training.steps,
            exits.rotation_interval,
        )
        return depth_weights(boundaries, num_layers, exits.depth_scale, enabled)
    weights = {
        boundary: scheduled_weight(
            exits.weight_schedule, initial, weight, exits.schedule_steps, step
        )
        for boundary, initial, weight in zip(
            exits.boundaries, exits.initial_weights, exits.weights, strict=True
        )
    }
    return weights | {num_layers: 1.0}
