"""The margin of a token: how far logits are from drawing it, which separates rounding from bugs."""

import math

import pytest
import torch

from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import sample, token_margin

pytestmark = pytest.mark.thorough

SETTINGS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.2},
    {"repetition_penalty": 1.5},
    {"temperature": 0.9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.7},
]


def test_margin_is_zero_only_for_the_drawn_token() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed, settings in enumerate(SETTINGS):
        sampling = SamplingParams(seed=seed, **settings)
        for position in range(8):
            logits = torch.randn(12, generator=generator, dtype=torch.float64) * 2
            history = [(3 * i) % 12 for i in range(position + 1)]
            drawn = sample(logits, sampling, position, history)
            margins = [
                token_margin(logits, sampling, position, token, history) for token in range(12)
            ]
            assert margins[drawn] == 0.0
            assert min(margins[:drawn] + margins[drawn + 1 :]) > 0.0


@pytest.mark.parametrize("settings", SETTINGS)
def test_margins_are_bounded_by_the_perturbation(settings: dict[str, float]) -> None:
    """A token drawn from perturbed logits has a margin of at most twice the perturbation."""
    generator = torch.Generator().manual_seed(1)
    error, differ = 0.15, 0
    for position in range(200):
        sampling = SamplingParams(seed=2, **settings)
        history = [(5 * i) % 7 for i in range(position + 1)]
        logits = torch.randn(12, generator=generator, dtype=torch.float64)
        noise = torch.rand(12, generator=generator, dtype=torch.float64) * 2 - 1
        drawn = sample(logits + error * noise, sampling, position, history)
        differ += drawn != sample(logits, sampling, position, history)
        penalty = sampling.repetition_penalty
        bound = 2 * error * max(penalty, 1 / penalty) / (sampling.temperature or 1.0)
        assert token_margin(logits, sampling, position, drawn, history) <= bound
    assert differ > 5  # The perturbation changed some tokens.


def _assert_margins_at_a_border(
    logits: torch.Tensor, outside: SamplingParams, inside: SamplingParams, num_positions: int
) -> None:
    """Token 1 is drawn just inside, token 0 just outside; an error of 1e-4 explains either."""
    positions = [p for p in range(num_positions) if sample(logits, inside, p) == 1]
    assert positions
    for position in positions:
        assert sample(logits, outside, position) == 0
        assert token_margin(logits, outside, position, 1) == pytest.approx(1e-4, rel=1e-6)
        assert token_margin(logits, inside, position, 0) == pytest.approx(1e-4, rel=1e-6)


def test_margin_at_the_border_of_top_p_is_the_missing_probability() -> None:
    """Token 1 has the better score but comes after 0.6 of the probability, just outside."""
    logits = torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64).log()
    outside, inside = (
        SamplingParams(temperature=1.0, top_p=0.5999),
        SamplingParams(temperature=1.0, top_p=0.6001),
    )
    _assert_margins_at_a_border(logits, outside, inside, num_positions=30)


def test_margin_outside_top_k_is_the_gap_to_it() -> None:
    """Regardless of its score, token 1 must first become one of the most probable tokens."""
    logits = torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64).log()
    positions = [p for p in range(30) if sample(logits, SamplingParams(temperature=1.0), p) == 1]
    assert positions
    for position in positions:
        margin = token_margin(logits, SamplingParams(temperature=1.0, top_k=1), position, 1)
        assert margin == pytest.approx(math.log(0.6 / 0.25), rel=1e-9)


def test_margin_at_the_border_of_min_p_is_the_missing_logit() -> None:
    """Token 1 has the better score but a probability just too small, 0.6 of the greatest one."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    outside = SamplingParams(temperature=1.0, min_p=0.6 * math.exp(1e-4))
    inside = SamplingParams(temperature=1.0, min_p=0.6 * math.exp(-1e-4))
    _assert_margins_at_a_border(logits, outside, inside, num_positions=40)


def test_the_most_probable_token_leaves_the_min_p_set_only_when_overtaken() -> None:
    """If it were compared with itself, any error above -log min_p would explain it."""
    logits = torch.tensor([0.0, -0.1], dtype=torch.float64)
    sampling = SamplingParams(temperature=1.0, min_p=0.95)
    far = [
        p for p in range(40) if token_margin(logits, SamplingParams(temperature=1.0), p, 1) > 0.2
    ]
    assert far
    for position in far:
        margin = token_margin(logits, sampling, position, 1)
        assert margin == pytest.approx(0.1 - math.log(0.95), rel=1e-9)


def test_margin_is_measured_after_the_penalty() -> None:
    logits = torch.tensor([3.0, 2.0, -1.0])
    greedy = SamplingParams(repetition_penalty=2.0)
    assert token_margin(logits, greedy, 1, 1, [0, 2]) == 0.0
    assert token_margin(logits, greedy, 1, 0, [0, 2]) == pytest.approx(0.5)
    assert token_margin(logits, greedy, 1, 2, [0, 2]) == pytest.approx(4.0)
    one = SamplingParams(temperature=0.5, top_k=1, repetition_penalty=2.0)
    assert token_margin(logits, one, 1, 0, [0, 2]) == pytest.approx(1.0)


def test_a_top_k_beyond_the_vocabulary_is_no_limit() -> None:
    logits = torch.arange(5.0)
    margins = [
        token_margin(logits, SamplingParams(temperature=1.0, top_k=k), 3, 0, ())
        for k in (0, 5, 10**30)
    ]
    assert margins[0] > 0.0
    assert margins == [margins[0]] * 3
