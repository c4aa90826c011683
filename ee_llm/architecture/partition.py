"""Which pipeline stage has which layers and exits."""

from ee_llm.config import Config
from ee_llm.errors import ConfigError


def stage_layers(config: Config, stage: int) -> range:
    """The numbers (from 1) of the layers on a pipeline stage (from 0)."""
    num_stages = config.parallel.num_stages
    if not 0 <= stage < num_stages:
        raise ConfigError(f"stage {stage} is outside 0..{num_stages - 1}")
    each, over = divmod(config.depth, num_stages)
    even = [each + (number < over) for number in range(num_stages)]
    split = config.parallel.layer_split or even
    first = sum(split[:stage]) + 1
    return range(first, first + split[stage])


def exit_stage(config: Config, boundary: int) -> int:
    """The pipeline stage (from 0) of the exit at `boundary`; the final exit's is the last.

    A post-exit is on the stage of layer `boundary`, a pre-exit on that of the layer after it.
    """
    num_layers, num_stages = config.model.num_layers, config.parallel.num_stages
    if boundary == num_layers:
        return num_stages - 1
    if boundary not in config.exits.boundaries:
        raise ConfigError(
            f"no exit at boundary {boundary}: exits.boundaries = {list(config.exits.boundaries)}"
        )
    layer = boundary if config.exits.placement == "post" else boundary + 1
    layer = min(layer, config.depth)  # no layer stands behind the last exit that is tuned
    return next(stage for stage in range(num_stages) if layer in stage_layers(config, stage))
