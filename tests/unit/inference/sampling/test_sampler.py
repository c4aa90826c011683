"""Tokens drawn from logits, for all sampling parameters and independently of other rows."""

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ee_llm.inference.sampling import sampler as sampling_module
from ee_llm.inference.sampling.noise import gumbel_noise
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import _kept, draw, sample, token_margin


def _plain_kept(values: list[float], sampling: SamplingParams) -> list[int]:
    """Return the ids that may be drawn from scaled logits, by definition."""
    best = max(values)
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = kept[: sampling.top_k or None]
    before = [0.0, *itertools.accumulate(math.exp(values[i] - best) for i in kept)]
    if sampling.top_p < 1.0:
        ahead = zip(kept, before[:-1], strict=True)
        kept = [i for i, mass in ahead if mass < sampling.top_p * before[-1]]
    return sorted(i for i in kept if math.exp(values[i] - best) >= sampling.min_p)


def _plain_draw(
    logits: Tensor, sampling: SamplingParams, position: int, history: Sequence[int]
) -> int:
    """Return the token of one row, by definition."""
    values, penalty = logits.double().tolist(), sampling.repetition_penalty
    for i in set(history):
        values[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty
    if sampling.temperature == 0.0:
        return values.index(max(values))
    values = [value / sampling.temperature for value in values]
    noise = gumbel_noise(sampling.seed, position, torch.arange(len(values))).tolist()
    return max(_plain_kept(values, sampling), key=lambda i: values[i] + noise[i])


def _random_batch(
    num_rows: int, size: int, seed: int
) -> tuple[Tensor, list[SamplingParams], list[int], list[list[int]]]:
    """Return logits with ties, and mixed sampling parameters, positions and histories."""
    generator = torch.Generator().manual_seed(seed)

    def choose(values: Sequence[float]) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    logits = (torch.randn(num_rows, size, generator=generator) * 2).bfloat16()
    params = [
        SamplingParams(
            temperature=choose([0.0, 0.6, 1.0, 1.7]),
            top_k=int(choose([0, 0, 1, 5, size // 2, size + 3])),
            top_p=choose([1.0, 1.0, 1e-6, 0.3, 0.9, 0.999]),
            seed=int(choose([0, 1, 2**63 - 1])),
            min_p=choose([0.0, 0.0, 0.02, 0.4, 1.0]),
            repetition_penalty=choose([1.0, 1.0, 1.3, 0.8]),
        )
        for _ in range(num_rows)
    ]
    positions = torch.randint(9, (num_rows,), generator=generator).tolist()
    histories = [
        torch.randint(size, (position + 1,), generator=generator).tolist() for position in positions
    ]
    return logits, params, positions, histories


@pytest.mark.parametrize(("num_rows", "size"), [(400, 12), (60, 3000)])
def test_a_row_draws_the_token_by_definition_for_any_other_rows(num_rows: int, size: int) -> None:
    logits, params, positions, histories = batch = _random_batch(num_rows, size, seed=0)
    tokens = draw(*batch).tolist()
    for row, token in enumerate(tokens):
        args = (logits[row], params[row], positions[row], histories[row])
        assert token == sample(*args) == _plain_draw(*args), params[row]
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1)).tolist()
    mixed = [[part[row] for row in order] for part in batch[1:]]
    assert draw(logits[order], *mixed).tolist() == [tokens[row] for row in order]


@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("size", [1, 12, 3000])
def test_the_kept_tokens_are_those_of_the_definition(size: int, spread: float) -> None:
    """Flat rows keep more tokens than are sorted at first; rounded logits tie at the border."""
    logits, params, *_ = _random_batch(30, size, seed=4)
    scaled = (logits * spread).double()
    kept = _kept(scaled, params)
    for row, sampling in enumerate(params):
        expected = _plain_kept(scaled[row].tolist(), sampling)
        assert kept[row].nonzero()[:, 0].tolist() == expected, sampling
        single = _kept(scaled[row : row + 1], [sampling])  # sorts fewer than the largest top_k
        assert (kept[row] if single is None else single[0]).equal(kept[row]), sampling


def test_top_p_ends_where_its_share_is_reached() -> None:
    for top_p, expected in ((0.5, [0, 1]), (0.5001, [0, 1, 2]), (0.25, [0]), (0.7499, [0, 1, 2])):
        kept = _kept(
            torch.zeros(1, 4, dtype=torch.float64), [SamplingParams(temperature=1.0, top_p=top_p)]
        )
        assert kept.nonzero()[:, 1].tolist() == expected


def test_sizes_of_batches_and_sorts_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = _random_batch(60, 300, seed=2)
    expected = draw(*batch)
    for num_sorted, num_cached in ((1, 1), (7, 2**30), (2**30, 1000)):
        monkeypatch.setattr(sampling_module, "NUM_SORTED", num_sorted)
        monkeypatch.setattr(sampling_module, "NUM_CACHED", num_cached)
        assert torch.equal(draw(*batch), expected)


def test_greedy_rows_cost_one_argmax_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "_draw", None)
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    found = draw(logits, [SamplingParams(seed=3)] * 5, [0] * 5, [()] * 5)
    assert torch.equal(found, logits.argmax(dim=-1))
    assert draw(logits[:0], [], [], []).tolist() == []


def test_the_penalty_applies_first_and_only_to_seen_tokens() -> None:
    """Positive logits are divided, negative ones multiplied, once even for a repeated token."""
    greedy = SamplingParams(repetition_penalty=2.0)
    logits = torch.tensor([3.0, 2.0, -1.0])
    assert sample(logits, greedy, 0, [2]) == 0
    assert sample(logits, greedy, 1, [0, 2]) == 1  # 1.5 2 -2
    assert sample(logits, greedy, 3, [0, 1, 0, 0]) == 0  # 1.5 1 -1
    assert sample(torch.tensor([-1.0, -1.5]), greedy, 0, [0]) == 1  # -2 -1.5
    assert sample(torch.tensor([-1.0, -1.5]), SamplingParams(repetition_penalty=0.5), 0, [1]) == 1
    # Each of these sets contains only the second token of 1.5 2 -2, and only the first of 3 2 -1.
    for one in ({"top_k": 1}, {"top_p": 0.4}, {"min_p": 0.7}):
        params = [
            SamplingParams(temperature=1.0, seed=seed, repetition_penalty=2.0, **one)
            for seed in range(20)
        ]
        drawn = draw(logits.expand(20, 3), params, [1] * 20, [[0, 2]] * 20)
        assert drawn.tolist() == [1] * 20
    with pytest.raises(AssertionError, match="the history of a row"):
        sample(logits, greedy, 1, [])


def test_min_p_is_a_share_of_the_greatest_probability_at_the_temperature() -> None:
    """0.5 0.3 0.2 are 1 0.6 0.4 of the largest; at temperature 2, their square roots."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()

    def support(**params: float) -> set[int]:
        rows = [SamplingParams(seed=seed, **params) for seed in range(60)]
        return set(draw(logits.expand(60, 3), rows, [0] * 60, [()] * 60).tolist())

    assert support(temperature=1.0, min_p=0.39) == {0, 1, 2}
    assert support(temperature=1.0, min_p=0.41) == {0, 1}
    assert support(temperature=1.0, min_p=0.61) == {0}
    assert support(temperature=2.0, min_p=0.61) == {0, 1, 2}
    assert support(temperature=2.0, min_p=0.64) == {0, 1}
    assert support(temperature=1.0, min_p=1.0) == {0}
    assert support(temperature=1.0, min_p=0.39, top_p=0.79) == {0, 1}


def _draws(logits: Tensor, sampling: SamplingParams, draws: int) -> Tensor:
    rows = logits.expand(draws, len(logits))
    return draw(rows, [sampling] * draws, range(draws), [()] * draws)


def _counts(logits: torch.Tensor, sampling: SamplingParams, draws: int) -> torch.Tensor:
    tokens = _draws(logits, sampling, draws)
    return torch.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"temperature": 1.0}, range(6)),
        ({"temperature": 0.5}, range(6)),
        ({"temperature": 2.0, "top_k": 3}, (1, 3, 4)),
        ({"temperature": 1.0, "top_p": 0.85}, (1, 2, 3, 4)),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.62}, (1, 3)),
        ({"temperature": 1.0, "min_p": 0.5}, (1, 3, 4)),
    ],
)
def test_draws_follow_the_distribution(params: dict[str, float], kept: tuple[int, ...]) -> None:
    """Chi-square test of 1,500 positions; a false alarm for 1 seed in 10**4."""
    probabilities = torch.tensor([0.04, 0.3, 0.13, 0.3001, 0.2, 0.0299], dtype=torch.float64)
    logits = probabilities.log() - 2.0
    draws = 1500
    counts = _counts(logits, SamplingParams(seed=3, **params), draws)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[list(kept)] = (logits[list(kept)] / params["temperature"]).softmax(dim=0) * draws
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    degrees = torch.tensor((len(kept) - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(degrees, statistic / 2)) > 1e-4


def test_successive_positions_are_independent() -> None:
    """Chi-square test of adjacent pairs; a false alarm for 1 seed in 10**4."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    tokens = _draws(logits, SamplingParams(temperature=1.0, seed=9), 2001).tolist()
    pairs = torch.zeros(3, 3, dtype=torch.float64)
    for left, right in pairwise(tokens):
        pairs[left, right] += 1
    expected = logits.exp()[:, None] * logits.exp() * 2000
    statistic = ((pairs - expected) ** 2 / expected).sum()
    eight_degrees = torch.tensor(8 / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(eight_degrees, statistic / 2)) > 1e-4


def test_greedy_takes_the_lowest_id_of_ties() -> None:
    assert sample(torch.tensor([0.0, 2.0, 2.0]), SamplingParams(seed=5), 0) == 1
    assert (
        sample(torch.tensor([0.0, 2.0, 2.0]), SamplingParams(temperature=1.0, top_k=1, seed=5), 0)
        == 1
    )
    assert (
        sample(
            torch.tensor([0.0, 2.0, 2.0]), SamplingParams(temperature=1.0, top_p=1e-9, seed=5), 0
        )
        == 1
    )


def test_params_out_of_range_are_refused() -> None:
    for params in (
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**63},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
    ):
        ((name, value),) = params.items()
        with pytest.raises(ValueError, match=f"^{name} = {value}"):
            SamplingParams(**params)


_NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=0.0)
_ANY_SAMPLING = st.builds(
    SamplingParams,
    temperature=_NUMBERS,
    top_k=st.integers(0, 2**63),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(5e-324, 1.7e308),
)


@pytest.mark.thorough
@hypothesis.settings(max_examples=300, deadline=None)
@given(
    st.lists(_ANY_SAMPLING, min_size=1, max_size=3),
    st.lists(st.floats(-3e38, 3e38), min_size=2, max_size=9),
    st.integers(0, 2**31 - 1),
)
def test_any_permitted_params_draw_a_token(
    many: list[SamplingParams], values: list[float], position: int
) -> None:
    """A temperature of 1e-307 must not give infinities, nor an exception with top-k."""
    logits = torch.tensor([values] * len(many))
    histories = [(0, len(values) - 1)] * len(many)
    tokens = draw(logits, many, [position] * len(many), histories)
    assert all(0 <= token < len(values) for token in tokens.tolist())
    for row, sampling in enumerate(many):
        assert sample(logits[row], sampling, position, histories[row]) == tokens[row]
        assert (
            token_margin(logits[row], sampling, position, int(tokens[row]), histories[row]) == 0.0
        )


@pytest.mark.parametrize("temperature", [5e-324, 1e-307, 1e-300, 1e-12])
@pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_the_smallest_temperatures_are_greedy(temperature: float, limits: dict) -> None:
    logits = torch.tensor([[0.5, 3.0, 2.9999, -40.0]])
    assert draw(
        logits, [SamplingParams(temperature=temperature, **limits)], [3], [()]
    ).tolist() == [1]


@pytest.mark.parametrize("value", [1.5, 1.0, True, "3", None])
@pytest.mark.parametrize("name", ["top_k", "seed"])
def test_integers_are_integers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} .* must be an integer"):
        SamplingParams(**{name: value})
