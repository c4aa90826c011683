"""The training schedule that a configuration asks for."""

from collections.abc import Callable

from ee_llm.architecture.partition import exit_stage
from ee_llm.config import Config
from ee_llm.errors import ConfigError
from ee_llm.pipeline.plan import Plan, Visit
from ee_llm.pipeline.schedules.bubble_filling import (
    cooldown_visits,
    filled_1f1b,
    most_fills,
    most_useful_warmup_fills,
    warmup_visits,
)
from ee_llm.pipeline.schedules.interleaved import interleaved
from ee_llm.pipeline.schedules.tuning import tuning_plan
from ee_llm.pipeline.schedules.zero_bubble import zero_bubble_h1

FILLS = ("parallel.fill_warmup", "parallel.fill_cooldown")


def select_plan(config: Config, num_microbatches: int) -> Plan:
    """Return the plan of `num_microbatches` and those that fill bubbles beside them.

    Raises PlanError where microbatches or fills do not suit the schedule.
    """
    parallel = config.parallel
    if config.is_tuning:
        return tuning_plan(parallel.pipeline, num_microbatches, exit_stages(config))
    if parallel.schedule != "1f1b":
        split_exits = parallel.schedule == "zero-bubble-exits"
        return zero_bubble_h1(parallel.pipeline, num_microbatches, split_exits)
    if parallel.virtual > 1:
        return interleaved(parallel.pipeline, parallel.virtual, num_microbatches)
    return filled_1f1b(parallel.pipeline, num_microbatches, *_fill_visits(config))


def select_fills(config: Config) -> tuple[int, int]:
    """Return how many further microbatches fill the warm-up and the cool-down of each step.

    Raises ConfigError for more than are useful.
    """
    warmup, cooldown = _fill_visits(config)
    return len(warmup), len(cooldown)


def _fill_visits(config: Config) -> tuple[tuple[Visit, ...], tuple[Visit, ...]]:
    if not _has_room(config):
        return (), ()
    size, ratio = config.parallel.pipeline, config.parallel.forward_over_backward
    stages = exit_stages(config)
    most_warmup, most_cooldown = largest_fills(config)

    def visits(name: str, most: int, make: Callable[[int], tuple[Visit, ...]]) -> tuple[Visit, ...]:
        asked = getattr(config.parallel, name)
        try:
            return make(most if asked == "auto" else asked)
        except ValueError as error:
            raise ConfigError(
                f"parallel.{name} = {asked}: {error}; set it to {most} or auto"
            ) from None

    return (
        visits("fill_warmup", most_warmup, lambda n: warmup_visits(size, n, ratio, stages)),
        visits("fill_cooldown", most_cooldown, lambda n: cooldown_visits(size, n, ratio)),
    )


def largest_fills(config: Config) -> tuple[int, int]:
    """Return how many fills are useful in warm-up and in cool-down: (0, 0) but with plain 1F1B.

    Useful are those that fit into the bubble and, in the warm-up, meet an early exit, each of them.
    """
    if not _has_room(config):
        return 0, 0
    size, ratio = config.parallel.pipeline, config.parallel.forward_over_backward
    useful = most_useful_warmup_fills(size, ratio, exit_stages(config))
    return useful, most_fills(size, ratio)


def _has_room(config: Config) -> bool:
    # Other schedules have no bubbles that visits of these forms would fit into.
    return (
        not config.is_tuning and config.parallel.schedule == "1f1b" and config.parallel.virtual == 1
    )


def exit_stages(config: Config) -> list[int]:
    """Return the stage of every early exit; in tuning, of those that are tuned."""
    boundaries = config.tuning.exits if config.is_tuning else config.exits.boundaries
    return [exit_stage(config, boundary) for boundary in boundaries]
