"""Frequencies of rotary position embeddings, shared by training and inference."""

import math

import torch
from torch import Tensor

from ee_llm.config import ModelConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Return the rotation angle of each pair per position, [head_dim / 2], in float32.

    The angles are theta^(-2 i / d) (RoFormer, arXiv 2104.09864, eq. 15), scaled according to
    `model.rope_scaling` by position interpolation (arXiv 2306.15595) or by Llama 3.1's rule (arXiv
    2407.21783). They are float32 for every precision of the model, as published checkpoints expect,
    and equal those of transformers bit for bit.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    if model.rope_scaling == "linear":
        return frequencies / model.rope_factor
    if model.rope_scaling == "llama3":
        return _llama3_frequencies(model, frequencies)
    return frequencies


def _llama3_frequencies(model: ModelConfig, frequencies: Tensor) -> Tensor:
    """Divide low frequencies by `rope_factor`, keep high ones and interpolate in between."""
    length, factor = model.rope_original_length, model.rope_factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_low, is_high = wavelengths > length / low, wavelengths < length / high
    weight = (length / wavelengths - low) / (high - low)
    interpolated = (1 - weight) * frequencies / factor + weight * frequencies
    scaled = torch.where(is_low, frequencies / factor, interpolated)
    return torch.where(is_high, frequencies, scaled)
