"""Noise keyed by (seed, position, vocabulary id), and what is drawn with it."""

import math
from itertools import pairwise

import pytest
import torch

from ee_llm.inference.sampling import (
    Sampling,
    _log,
    _philox,
    gumbel_noise,
    sample,
    token_margin,
)

SETTINGS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.6},
]


def _plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as the paper has it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def test_random_bits_are_philox() -> None:
    """Against the known answers of Random123, and ours against the plain one at odd keys."""
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


def test_noise_is_the_same_for_every_shape_shard_and_batch() -> None:
    """torch.log fails this: a vector's body and its rest differ in the last bit."""
    ids = torch.arange(4099)
    whole = gumbel_noise(11, 5, ids)
    for start in (0, 1, 3, 1000, 4096):
        for size in (1, 2, 5, 17, 1024):
            part = gumbel_noise(11, 5, ids[start : start + size])
            assert torch.equal(part, whole[start : start + size])
    seeds, positions = torch.tensor([11, 12, 11])[:, None], torch.tensor([5, 5, 6])[:, None]
    batch = gumbel_noise(seeds, positions, ids)
    for row, seed, position in zip(batch, seeds.flatten(), positions.flatten(), strict=True):
        assert torch.equal(row, gumbel_noise(int(seed), int(position), ids))


def test_noise_has_stable_values() -> None:
    """Saved generations stay reproducible: a change of these numbers is a change of format."""
    noise = gumbel_noise(7, 3, torch.arange(3)).tolist()
    assert noise == [0.4916324768944599, 3.6940400069029273, 0.41840998912851995]


def test_noise_is_gumbel_and_uncorrelated_over_its_keys() -> None:
    """Mean, variance and correlations of 200,000 numbers; 5 sigma: 1 false alarm in 10**5 seeds."""
    ids, size = torch.arange(200_000), 200_000
    noise = gumbel_noise(1, 1, ids)
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * math.pi / math.sqrt(6 * size))
    # The fourth central moment of the Gumbel distribution is 5.4 var^2.
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=5 * math.sqrt(4.4 / size))
    for other in (gumbel_noise(2, 1, ids), gumbel_noise(1, 2, ids), noise.roll(1)):
        correlation = float(torch.corrcoef(torch.stack((noise, other)))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(size)


def _counts(logits: torch.Tensor, sampling: Sampling, draws: int) -> torch.Tensor:
    tokens = [sample(logits, sampling, position) for position in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=len(logits))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, range(6)),
        ({"temperature": 0.5}, range(6)),
        ({"temperature": 2.0, "top_k": 3}, (1, 3, 4)),
        ({"temperature": 1.0, "top_p": 0.85}, (1, 2, 3, 4)),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.62}, (1, 3)),
    ],
)
def test_draws_follow_the_distribution(settings: dict[str, float], kept: tuple[int, ...]) -> None:
    """Chi-square of 1,500 positions; a false alarm for 1 seed in 10**4."""
    probabilities = torch.tensor([0.04, 0.3, 0.13, 0.3001, 0.2, 0.0299], dtype=torch.float64)
    logits = probabilities.log() - 2.0
    draws = 1500
    counts = _counts(logits, Sampling(seed=3, **settings), draws)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[list(kept)] = (logits[list(kept)] / settings["temperature"]).softmax(dim=0) * draws
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    degrees = torch.tensor((len(kept) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(degrees, statistic / 2)) > 1e-4


def test_successive_positions_are_independent() -> None:
    """Chi-square of the pairs of neighbours; a false alarm for 1 seed in 10**4."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    tokens = [sample(logits, Sampling(1.0, seed=9), position) for position in range(2001)]
    pairs = torch.zeros(3, 3, dtype=torch.float64)
    for left, right in pairwise(tokens):
        pairs[left, right] += 1
    expected = logits.exp()[:, None] * logits.exp() * 2000
    statistic = ((pairs - expected) ** 2 / expected).sum()
    eight_degrees = torch.tensor(8 / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(eight_degrees, statistic / 2)) > 1e-4


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert sample(torch.tensor([0.0, 2.0, 2.0]), Sampling(seed=5), 0) == 1
    assert sample(torch.tensor([0.0, 2.0, 2.0]), Sampling(1.0, top_k=1, seed=5), 0) == 1
    assert sample(torch.tensor([0.0, 2.0, 2.0]), Sampling(1.0, top_p=1e-9, seed=5), 0) == 1


def test_settings_out_of_range_are_refused() -> None:
    for settings in (
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**63},
    ):
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=f"^{name} {value}"):
            Sampling(**settings)


def test_margin_is_zero_for_the_drawn_token_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed, settings in enumerate(SETTINGS):
        sampling = Sampling(seed=seed, **settings)
        for position in range(8):
            logits = torch.randn(12, generator=generator, dtype=torch.float64) * 2
            drawn = sample(logits, sampling, position)
            margins = [token_margin(logits, sampling, position, token) for token in range(12)]
            assert margins[drawn] == 0.0
            assert min(margins[:drawn] + margins[drawn + 1 :]) > 0.0


@pytest.mark.parametrize("settings", SETTINGS)
def test_rounding_explains_what_its_size_allows(settings: dict[str, float]) -> None:
    """Whatever perturbed logits draw has a margin of twice the perturbation at most."""
    generator = torch.Generator().manual_seed(1)
    error, differ = 0.15, 0
    for position in range(200):
        sampling = Sampling(seed=2, **settings)
        logits = torch.randn(12, generator=generator, dtype=torch.float64)
        noise = torch.rand(12, generator=generator, dtype=torch.float64) * 2 - 1
        drawn = sample(logits + error * noise, sampling, position)
        differ += drawn != sample(logits, sampling, position)
        bound = 2 * error / (sampling.temperature or 1.0)
        assert token_margin(logits, sampling, position, drawn) <= bound
    assert differ > 5  # the bound was put to the test


def test_margin_at_the_border_of_top_p_is_the_missing_probability() -> None:
    """Token 1 has the better score but comes after 0.6 of the probability, just outside."""
    logits = torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64).log()
    outside, inside = Sampling(1.0, top_p=0.5999), Sampling(1.0, top_p=0.6001)
    positions = [p for p in range(30) if sample(logits, inside, p) == 1]
    assert positions
    for position in positions:
        assert sample(logits, outside, position) == 0
        assert token_margin(logits, outside, position, 1) == pytest.approx(1e-4, rel=1e-6)
        assert token_margin(logits, inside, position, 0) == pytest.approx(1e-4, rel=1e-6)


def test_margin_outside_of_top_k_is_the_gap_to_it() -> None:
    """However good its score: token 1 must first become one of the most probable."""
    logits = torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64).log()
    positions = [p for p in range(30) if sample(logits, Sampling(1.0), p) == 1]
    assert positions
    for position in positions:
        margin = token_margin(logits, Sampling(1.0, top_k=1), position, 1)
        assert margin == pytest.approx(math.log(0.6 / 0.25), rel=1e-9)
