"""The rotation of queries and keys compared with the formula, forward and backward."""

import math

import torch

from ee_llm.config import load_config
from ee_llm.model.rotary import RotaryAngles, rotate


def plain(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + d / 2) as complex numbers."""
    low, high = heads.chunk(2, dim=-1)
    half = angles[..., : low.shape[-1]]
    rotated = torch.complex(low, high) * torch.polar(torch.ones_like(half), half)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    low, high = angles.sin().chunk(2, dim=-1)
    return rotate(heads, angles.cos(), torch.cat([-low, high], dim=-1))


def test_rotation_and_its_gradient_equal_complex_numbers():
    generator = torch.Generator().manual_seed(5)
    config = load_config(None, {"model.shape": "llama-tiny"}).model
    positions = torch.randint(100, (3, 7), generator=generator)
    angles = RotaryAngles(config, torch.float64)(positions)
    assert angles.shape == (7, 3, 1, config.head_dim)
    mixed = torch.randn(7, 3, 2, 2 * config.head_dim, dtype=torch.float64, generator=generator)
    heads = mixed[
        ..., : config.head_dim
    ].requires_grad_()  # Not contiguous, like the split of queries and keys.
    torch.testing.assert_close(rotated(heads, angles), plain(heads, angles), rtol=1e-13, atol=1e-13)
    upstream = torch.randn(heads.shape, dtype=torch.float64, generator=generator)
    (actual,) = torch.autograd.grad(rotated(heads, angles), heads, upstream)
    (expected,) = torch.autograd.grad(plain(heads, angles), heads, upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_scores_depend_only_on_the_distance():
    config = load_config(None, {"model.shape": "llama-tiny"}).model
    rotary = RotaryAngles(config, torch.float64)
    query, key = torch.randn(2, 1, 1, 1, config.head_dim, dtype=torch.float64)

    def score(at: int, other: int) -> float:
        q, k = (rotated(x, rotary(torch.tensor([[p]]))) for x, p in ((query, at), (key, other)))
        return float((q * k).sum())

    assert math.isclose(score(9, 4), score(25, 20), rel_tol=1e-9)
    assert not math.isclose(score(9, 4), score(25, 19), rel_tol=1e-3)
