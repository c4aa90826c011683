"""Noise keyed by (seed, position, vocabulary id), and functions that are bit-identical anywhere."""

import itertools
import math

import pytest
import torch

from ee_llm.inference.sampling.noise import _log, _philox, gumbel_noise, integer_exp


def _plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, as in the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_random_bits_are_philox() -> None:
    """Check the plain version against Random123's known answers, and ours against the plain one."""
    ones = 2**32 - 1
    for counter, key, answer in (
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ones] * 4, [ones] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ):
        assert [f"{word:08x}" for word in _plain_philox(counter, key)] == answer.split()
    ids = torch.tensor([0, 1, 4095, 2**31, ones])
    for seed in (0, 1, 2**32, 2**63 - 1, 0x123456789ABCDEF):
        for position in (0, 77, ones):
            words = torch.stack(_philox(seed, position, ids), dim=-1)
            for word, i in zip(words.tolist(), ids.tolist(), strict=True):
                plain = _plain_philox([i, position, 0, 0], [seed % 2**32, seed >> 32])
                assert word == plain[:2]


def test_log_is_accurate() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100_000, dtype=torch.float64, generator=generator)
    x = torch.cat((x, 1 - x * 2**-40, x * 2**-50, x * 40, torch.tensor([2.0**-53, 0.5, 2.0])))
    error = (_log(x) - x.log()).abs() / x.log().abs().clamp(min=1e-300)
    assert float(error.max()) < 1e-15


def test_integer_exp_is_accurate_and_the_same_for_every_shape() -> None:
    """No library guarantees this for its exponential."""
    generator = torch.Generator().manual_seed(0)
    x = -60 * torch.rand(100_001, dtype=torch.float64, generator=generator)
    x[:2] = torch.tensor([0.0, -math.inf])
    full = integer_exp(x, 62)
    error = (full.double() - x.exp() * 2.0**62).abs()
    assert bool((error <= 0.5 + 2e-15 * x.exp() * 2.0**62).all())
    assert full[:2].tolist() == [2**62, 0]
    for start, size in itertools.product((0, 1, 3, 1000), (1, 2, 5, 1024)):
        part = slice(start, start + size)
        assert torch.equal(integer_exp(x[part].clone(), 62), full[part])


def test_noise_is_the_same_for_every_shape_shard_and_batch() -> None:
    """torch.log fails this: the vectorised body and the remainder differ in the last bit."""
    ids = torch.arange(4099)
    full = gumbel_noise(11, 5, ids)
    for start in (0, 1, 3, 1000, 4096):
        for size in (1, 2, 5, 17, 1024):
            part = gumbel_noise(11, 5, ids[start : start + size])
            assert torch.equal(part, full[start : start + size])
    seeds, positions = torch.tensor([11, 12, 11])[:, None], torch.tensor([5, 5, 6])[:, None]
    batch = gumbel_noise(seeds, positions, ids)
    for row, seed, position in zip(batch, seeds.flatten(), positions.flatten(), strict=True):
        assert torch.equal(row, gumbel_noise(int(seed), int(position), ids))


def test_noise_has_stable_values() -> None:
    """Saved generations must stay reproducible, so changing these numbers breaks the format."""
    noise = gumbel_noise(7, 3, torch.arange(3)).tolist()
    assert noise == [0.4916324768944599, 3.6940400069029273, 0.41840998912851995]


def test_noise_is_gumbel_and_uncorrelated_over_its_keys() -> None:
    """Mean, variance and correlations of 200,000 numbers within 5 sigma: a wrong alarm in 10**5."""
    ids, size = torch.arange(200_000), 200_000
    noise = gumbel_noise(1, 1, ids)
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * math.pi / math.sqrt(6 * size))
    # The fourth central moment of the Gumbel distribution is 5.4 var^2.
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=5 * math.sqrt(4.4 / size))
    for other in (gumbel_noise(2, 1, ids), gumbel_noise(1, 2, ids), noise.roll(1)):
        correlation = float(torch.corrcoef(torch.stack((noise, other)))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(size)
