"""The partition of layers and exits into pipeline stages."""

from ee_llm.config import Config
from ee_llm.errors import ConfigError


def even_split(num_layers: int, num_stages: int) -> list[int]:
    """Return the number of layers of each stage; the first stages have one more if some must."""
    quotient, remainder = divmod(num_layers, num_stages)
    return [quotient + (stage < remainder) for stage in range(num_stages)]


def stage_layers(config: Config, stage: int) -> range:
    """Return the numbers (from 1) of the layers on a pipeline stage (from 0).

    The split is that of the layers that training computes; the last stage also has those that only
    a validation computes.

    Raises ConfigError if there is no such stage.
    """
    num_stages = config.parallel.num_stages
    if not 0 <= stage < num_stages:
        raise ConfigError(f"stage {stage} is outside 0..{num_stages - 1}")
    split = config.parallel.layer_split or even_split(config.depth, num_stages)
    first = sum(split[:stage]) + 1
    end = first + split[stage]
    if stage == num_stages - 1 and config.is_whole:
        end = config.model.num_layers + 1
    return range(first, end)


def exit_stage(config: Config, boundary: int) -> int:
    """Return the pipeline stage (from 0) of the exit at `boundary`.

    A post-exit is on the stage of layer `boundary`, a pre-exit on the stage of the next layer, and
    the final exit on the last stage. Raises ConfigError if there is no exit at `boundary`.
    """
    num_layers, num_stages = config.model.num_layers, config.parallel.num_stages
    if boundary == num_layers:
        return num_stages - 1
    if boundary not in config.exits.boundaries:
        raise ConfigError(
            f"no exit at boundary {boundary}: exits.boundaries = {list(config.exits.boundaries)}"
        )
    layer = boundary if config.exits.placement == "post" else boundary + 1
    layer = min(layer, config.depth)  # training computes no layer behind the last tuned exit
    return next(stage for stage in range(num_stages) if layer in stage_layers(config, stage))
