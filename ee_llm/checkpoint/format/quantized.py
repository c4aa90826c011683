"""Weights stored in 8 bits, each output with a scale of its own: for inference, not for training.

    <name>         int8 [o, i]
    <name>.scale   float32 [o]; the weight is <name> * scale

Legend of shapes: o outputs, i inputs.
"""

import torch
from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import CheckpointError

FACT = "quantized"
"""What the manifest of such a checkpoint says "int8" under."""

SCALE = ".scale"
_LARGEST = 127


def is_quantizable(name: str) -> bool:
    """Return whether a parameter is a weight [o, i] of a product; embeddings are looked up in."""
    return name.endswith(".weight") and (".linear_" in name or name.endswith("output.weight"))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values [o, i] and scales [o] of a weight: the nearest multiples, symmetric."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / _LARGEST
    scale[scale == 0] = 1.0
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def stored_weight(reader: TensorReader, name: str) -> Tensor:
    """Return a tensor as the model has it, in float32 where it is stored in 8 bits."""
    tensor = reader.tensor(name)
    if tensor.dtype != torch.int8:
        return tensor
    scale = reader.tensor(name + SCALE)
    if scale.shape != tensor.shape[:1]:
        raise CheckpointError(
            f"{reader.path}: {name + SCALE} has the shape {list(scale.shape)}, expected a "
            f"scale for each of {tensor.shape[0]} outputs"
        )
    return tensor.float() * scale[:, None]


def is_scale(reader: TensorReader, name: str) -> bool:
    """Return whether a tensor is the scale of another."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in reader


def refuse_quantized(reader: TensorReader) -> None:
    """Raise CheckpointError if the weights have 8 bits; they can be decoded with, and no more."""
    if reader.manifest.get(FACT) is not None:
        raise CheckpointError(
            f"{reader.path} has weights of 8 bits, which are to decode with; take the checkpoint "
            "that it was made of"
        )
