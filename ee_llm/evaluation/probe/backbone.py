"""A checkpoint's model without its exits, and with probed ones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import model_of
from ee_llm.config import Config
from ee_llm.inference.execution.teacher_forced import TeacherForced
from ee_llm.inference.exits.new_exits import tensors_with_new_exits


def backbone_config(config: Config) -> Config:
    """Return the configuration of a model without its early exits."""
    return _with_exits(config, {})


def probed_config(config: Config, boundaries: Sequence[int]) -> Config:
    """Return the configuration of a model whose only exits are least-squares ones."""
    head = ("translator", "norm")
    return _with_exits(config, {"boundaries": tuple(boundaries), "head": head, "output": "shared"})


class Backbone:
    """The residual stream of a model at some boundaries, from one pass over a window.

    It computes in float32, or in float64 for a float64 checkpoint, as `least_squares` does.

    Attributes:
        model: The model without early exits.
    """

    def __init__(self, reader: TensorReader, boundaries: Sequence[int], seq_length: int) -> None:
        """Build the model.

        Args:
            reader: The checkpoint.
            boundaries: Boundaries whose residual streams to return.
            seq_length: Greatest number of tokens of a window.

        Raises:
            CheckpointError: The checkpoint is quantized.
        """
        config = backbone_config(reader.config())
        self.model = TeacherForced(config, tensors_with_new_exits(reader, config), seq_length)
        self._boundaries = {*boundaries, config.model.num_layers}

    def streams(self, tokens: Tensor) -> dict[int, Tensor]:
        """Return the residual stream [t, h] at each boundary and at the final one, in order.

        Args:
            tokens: Token ids [t].
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> None:
            if layer in self._boundaries:
                found[layer] = hidden

        for _ in self.model(tokens, keep):
            pass
        return found


def _with_exits(config: Config, exits: dict[str, Any]) -> Config:
    return Config(**{**model_of(config).model_dump(), "exits": exits})
