"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math
from typing import Protocol

from ee_llm.errors import UserError

SCHEDULES = ("cosine", "linear", "constant", "wsd")


class ScheduleOptions(Protocol):
    """What the schedule reads of the optimizer's configuration."""

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
    """Return the learning rate of step 1, 2, ... of a run of `total_steps` steps.

    Warm-up is lr * step / warmup_steps. After it, with u = (step - 1 - warmup_steps) / (end -
    warmup_steps) and end = `decay_steps` (default `total_steps`). So the lowest rate is reached
    when step `end` is done, as in Megatron-LM and torchtitan: the last step trains, even if the
    lowest rate is 0, and so does a run of one step.

    - cosine: min_lr + (lr - min_lr) * (1 + cos(pi u)) / 2 (Loshchilov and Hutter, 1608.03983)
    - linear: lr - (lr - min_lr) * u
    - constant: lr
    - wsd: lr up to `wsd_decay_steps` before the end, then linear (MiniCPM, 2404.06395)

    After `end` every decaying schedule stays at `min_lr`.

    Raises UserError for an unknown schedule and for a step below 1.
    """
    if step < 1:
        raise UserError(f"steps are counted from 1, got {step}")
    if options.schedule not in SCHEDULES:
        raise UserError(
            f"optimizer.schedule: {options.schedule!r} is not one of {', '.join(SCHEDULES)}"
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
    behind = (step - 1 - start) / (end - start)
    if options.schedule == "cosine":
        return options.min_lr + (options.lr - options.min_lr) * (1 + math.cos(math.pi * behind)) / 2
    return options.lr - (options.lr - options.min_lr) * behind


def wasted_steps(options: ScheduleOptions, total_steps: int) -> str:
    """Return a warning if the last steps of a run have a learning rate of 0, "" if they train."""
    end = options.decay_steps
    if end is None or end >= total_steps or learning_rate(total_steps, options, total_steps) > 0:
        return ""
    return (
        f"steps {end + 1} to {total_steps} train nothing: their learning rate is optimizer.min_lr "
        f"= 0, as optimizer.decay_steps = {end}; give optimizer.min_lr, or leave "
        "optimizer.decay_steps out"
    )
