"""The frequencies of rotary position embeddings, in one place for training and inference."""

import math

import torch
from torch import Tensor

from ee_llm.config import ModelConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Return the angle [head_dim / 2] by which each pair turns from a position to the next.

    theta^(-2 i / d) of RoFormer (arXiv 2104.09864, eq. 15), scaled as `model.rope_scaling` says:
    position interpolation (arXiv 2306.15595) or Llama 3.1's (arXiv 2407.21783). In float32, which
    every precision takes them from: the convention of published checkpoints, bit for bit that of
    transformers.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    if model.rope_scaling == "linear":
        return frequencies / model.rope_factor
    if model.rope_scaling == "llama3":
        return _slowed(model, frequencies)
    return frequencies


def _slowed(model: ModelConfig, frequencies: Tensor) -> Tensor:
    """Divide the frequencies that turn seldom over the original length, and mix in between."""
    length, factor = model.rope_original_length, model.rope_factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_slow, is_fast = wavelengths > length / low, wavelengths < length / high
    share = (length / wavelengths - low) / (high - low)
    mixed = (1 - share) * frequencies / factor + share * frequencies
    slowed = torch.where(is_slow, frequencies / factor, mixed)
    return torch.where(is_fast, frequencies, slowed)
