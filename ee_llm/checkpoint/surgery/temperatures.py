"""Changes the temperatures of exits; all tensors are copied bit for bit."""

from collections.abc import Mapping
from dataclasses import replace

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import Rewrite, copy_of, with_options
from ee_llm.errors import CheckpointError, ConfigError


def with_temperatures(reader: TensorReader, temperatures: Mapping[int, float]) -> Rewrite:
    """Return the checkpoint with other temperatures of its exits, including the optimizer's state.

    Args:
        reader: The checkpoint.
        temperatures: The new temperature of each early exit, by boundary.

    Raises:
        CheckpointError: A temperature is out of range, or the checkpoint is quantized.
    """
    whole = copy_of(reader)
    values = tuple(temperatures[boundary] for boundary in whole.config.exits.boundaries)
    try:
        config = with_options(whole.config, exits={"temperatures": values})
    except ConfigError as error:
        raise CheckpointError(f"{reader.path}: {error}") from None
    return replace(whole, config=config)
