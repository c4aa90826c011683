"""Quantize a checkpoint's linear weights to 8 bits, tensor by tensor."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ee_llm.checkpoint.format.quantized import SCALE, is_quantizable, quantize
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.errors import ConversionError


def in_8_bits(
    specs: Mapping[str, TensorSpec], get: Callable[[str], Tensor]
) -> tuple[dict[str, TensorSpec], Callable[[str], Tensor]]:
    """Return the tensors of a checkpoint with linear weights in 8 bits, and their scales.

    Args:
        specs: The shape and dtype of each tensor, by name.
        get: Returns a tensor.

    Returns:
        The specs of the new tensors, and the function that returns one.
    """
    quantized_specs: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if is_quantizable(name):
            quantized_specs[name] = TensorSpec(spec.shape, torch.int8)
            quantized_specs[name + SCALE] = TensorSpec(spec.shape[:1], torch.float32)
        else:
            quantized_specs[name] = spec

    # The writer reads a weight right before its scale.
    @functools.lru_cache(maxsize=1)
    def pair(name: str) -> tuple[Tensor, Tensor]:
        values, scale = quantize(get(name))
        if not bool(torch.isfinite(scale).all()):
            raise ConversionError(
                f"{name} has weights that are not finite, so it cannot be quantized"
            )
        return values, scale

    def quantized(name: str) -> Tensor:
        if name in specs:
            return pair(name)[0] if is_quantizable(name) else get(name)
        return pair(name.removesuffix(SCALE))[1]

    return quantized_specs, quantized
