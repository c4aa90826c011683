"""Select the plan of a configuration."""

from collections.abc import Callable

from ee_llm.architecture.partition import exit_stage
from ee_llm.config import Config
from ee_llm.errors import ConfigError
from ee_llm.pipeline.plan import Plan, Visit
from ee_llm.pipeline.schedules.bubble_filling import (
    cooldown_visits,
    filled_1f1b,
    max_fills,
    max_useful_warmup_fills,
    warmup_visits,
)
from ee_llm.pipeline.schedules.interleaved import interleaved
from ee_llm.pipeline.schedules.tuning import distillation_plan, tuning_plan
from ee_llm.pipeline.schedules.zero_bubble import zero_bubble_h1

FILLS = ("parallel.fill_warmup", "parallel.fill_cooldown")


def select_plan(config: Config, num_microbatches: int) -> Plan:
    """Return the plan for `num_microbatches` ordinary microbatches and those that fill bubbles.

    Raises:
        PlanError: The number of microbatches or of fills does not fit the schedule.
    """
    parallel = config.parallel
    if config.distills:
        return distillation_plan(parallel.pipeline, num_microbatches)
    if config.is_tuning:
        return tuning_plan(parallel.pipeline, num_microbatches, exit_stages(config))
    if parallel.schedule != "1f1b":
        split_exits = parallel.schedule == "zero-bubble-exits"
        return zero_bubble_h1(parallel.pipeline, num_microbatches, split_exits)
    if parallel.virtual > 1:
        return interleaved(parallel.pipeline, parallel.virtual, num_microbatches)
    return filled_1f1b(parallel.pipeline, num_microbatches, *_fill_visits(config))


def select_fills(config: Config) -> tuple[int, int]:
    """Return the numbers of microbatches that fill the warm-up and the cool-down of each step.

    Raises:
        ConfigError: More fills are configured than are useful.
    """
    warmup, cooldown = _fill_visits(config)
    return len(warmup), len(cooldown)


def _fill_visits(config: Config) -> tuple[tuple[Visit, ...], tuple[Visit, ...]]:
    if not _has_fillable_bubbles(config):
        return (), ()
    size, ratio = config.parallel.pipeline, config.parallel.forward_over_backward
    stages = exit_stages(config)
    max_warmup, max_cooldown = largest_fills(config)

    def visits(
        name: str, largest: int, make: Callable[[int], tuple[Visit, ...]]
    ) -> tuple[Visit, ...]:
        value = getattr(config.parallel, name)
        try:
            return make(largest if value == "auto" else value)
        except ValueError as error:
            raise ConfigError(
                f"parallel.{name} = {value}: {error}. Set it to {largest} or auto."
            ) from None

    return (
        visits("fill_warmup", max_warmup, lambda n: warmup_visits(size, n, ratio, stages)),
        visits("fill_cooldown", max_cooldown, lambda n: cooldown_visits(size, n, ratio)),
    )


def largest_fills(config: Config) -> tuple[int, int]:
    """Return the largest useful numbers of fills in warm-up and cool-down.

    A fill is useful if it fits into the bubble and, in the warm-up, reaches an early exit. The
    numbers are (0, 0) for schedules other than plain 1F1B.
    """
    if not _has_fillable_bubbles(config):
        return 0, 0
    size, ratio = config.parallel.pipeline, config.parallel.forward_over_backward
    useful = max_useful_warmup_fills(size, ratio, exit_stages(config))
    return useful, max_fills(size, ratio)


def _has_fillable_bubbles(config: Config) -> bool:
    # The bubbles of other schedules do not fit these visits.
    return (
        not config.is_tuning and config.parallel.schedule == "1f1b" and config.parallel.virtual == 1
    )


def exit_stages(config: Config) -> list[int]:
    """Return the stage of every early exit, or in tuning of every tuned exit."""
    boundaries = config.tuning.exits if config.is_tuning else config.exits.boundaries
    return [exit_stage(config, boundary) for boundary in boundaries]
