"""The training schedule that a configuration asks for."""

from ee_llm.config import Config, ConfigError, exit_stage
from ee_llm.pipeline.filled import (
    cooldown_visits,
    filled_1f1b,
    most_fills,
    most_useful_warmup_fills,
    warmup_visits,
)
from ee_llm.pipeline.interleaved import interleaved
from ee_llm.pipeline.plan import Plan
from ee_llm.pipeline.zero_bubble import zero_bubble_h1


def chosen_plan(config: Config, num_microbatches: int) -> Plan:
    """Return the plan of `num_microbatches` and those that fill bubbles beside them.

    Raises ValueError where microbatches or fills do not suit the schedule.
    """
    parallel = config.parallel
    size, ratio = parallel.pipeline, parallel.forward_over_backward
    if parallel.schedule == "zero-bubble":
        return zero_bubble_h1(size, num_microbatches)
    if parallel.virtual > 1:
        return interleaved(size, parallel.virtual, num_microbatches)
    warmup, cooldown = chosen_fills(config)
    return filled_1f1b(
        size,
        num_microbatches,
        warmup_visits(size, warmup, ratio, exit_stages(config)),
        cooldown_visits(size, cooldown, ratio),
    )


def chosen_fills(config: Config) -> tuple[int, int]:
    """Return how many further microbatches fill the warm-up and the cool-down of each step.

    Raises ConfigError for more than are useful.
    """
    warmup, cooldown = largest_fills(config)
    return (
        _chosen(config, "fill_warmup", warmup, "fit into the bubble and meet an early exit there"),
        _chosen(config, "fill_cooldown", cooldown, "fit into the bubble"),
    )


def _chosen(config: Config, name: str, most: int, why: str) -> int:
    asked = getattr(config.parallel, name)
    if asked == "auto":
        return most
    if asked > most:
        raise ConfigError(
            f"parallel.{name} = {asked}: the largest useful number is {most}, for no more {why} "
            f"with parallel.pipeline = {config.parallel.pipeline}, parallel.forward_over_backward "
            f"= {config.parallel.forward_over_backward:g} and exits on stages "
            f"{exit_stages(config)}; set it to {most} or auto"
        )
    return int(asked)


def largest_fills(config: Config) -> tuple[int, int]:
    """Return how many fills are useful in warm-up and in cool-down: (0, 0) but with plain 1F1B.

    Useful are those that fit into the bubble and, in the warm-up, meet an early exit, each of them.
    """
    parallel = config.parallel
    if parallel.schedule != "1f1b" or parallel.virtual > 1:
        return 0, 0
    size, ratio = parallel.pipeline, parallel.forward_over_backward
    useful = most_useful_warmup_fills(size, ratio, exit_stages(config))
    return useful, most_fills(size, ratio)


def exit_stages(config: Config) -> list[int]:
    """Return the stage of every early exit."""
    return [exit_stage(config, boundary) for boundary in config.exits.boundaries]
