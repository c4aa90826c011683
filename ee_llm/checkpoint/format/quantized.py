"""Weights stored in 8 bits with one scale per output, for inference only.

    <name>         int8 [o, i]
    <name>.scale   float32 [o]; the weight is <name> * scale

Legend of shapes: o outputs, i inputs.
"""

import torch
from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import CheckpointError

FACT = "quantized"
"""The entry of the manifest that is "int8" in such a checkpoint."""

SCALE = ".scale"
_LARGEST = 127


def is_quantizable(name: str) -> bool:
    """Return whether a parameter is the weight [o, i] of a matrix product, not an embedding."""
    return name.endswith(".weight") and (".linear_" in name or name.endswith("output.weight"))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values [o, i] and scales [o] of a weight, by symmetric rounding to nearest."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / _LARGEST
    scale[scale == 0] = 1.0
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def stored_weight(reader: TensorReader, name: str) -> Tensor:
    """Return a tensor of the model, dequantized to float32 if it is stored in 8 bits."""
    tensor = reader.tensor(name)
    if tensor.dtype != torch.int8:
        return tensor
    scale = reader.tensor(name + SCALE)
    if scale.shape != tensor.shape[:1]:
        raise CheckpointError(
            f"{reader.path}: {name + SCALE} has shape {list(scale.shape)}, expected one "
            f"scale for each of {tensor.shape[0]} outputs"
        )
    return tensor.float() * scale[:, None]


def is_scale(reader: TensorReader, name: str) -> bool:
    """Return whether a tensor is the scale of another."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in reader


def refuse_quantized(reader: TensorReader) -> None:
    """Raise CheckpointError if the weights are stored in 8 bits, which serves inference only."""
    if reader.manifest.get(FACT) is not None:
        raise CheckpointError(
            f"{reader.path} has 8-bit weights, which serve inference only. Use the checkpoint from "
            "which it was quantized."
        )
