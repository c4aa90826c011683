"""Test that drafts of `self-speculative` change neither tokens nor their distribution."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.config import Config
from ee_llm.inference.exits import decision
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling import sampler
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.engines import DRAWN, assert_same, make_engine, make_request, serve
from tests.unit.inference.engines import reference as dense
from tests.unit.inference.models import random_tensors, tiny_config

SMALL = tiny_config(
    boundaries=(1,), num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, vocab_size=6
)
NUM_SEEDS = 2000
FALSE_ALARM = 1e-6


def _tensors(config: Config, later: float) -> dict[str, torch.Tensor]:
    """Return weights whose layers after the first exit are scaled by `later`; at 0, it is final."""
    tensors = random_tensors(config)
    for name, tensor in tensors.items():
        if name.startswith("layers.") and int(name.split(".")[1]) > config.exits.boundaries[0]:
            tensor *= later if "linear_proj" in name or "linear_fc2" in name else 1.0
    final = f"exits.{config.model.num_layers}.norm"
    for boundary in config.exits.boundaries:
        for kind in ("weight", "bias"):
            if f"{final}.{kind}" in tensors:
                tensors[f"exits.{boundary}.norm.{kind}"] = tensors[f"{final}.{kind}"]
    return tensors


@pytest.mark.parametrize("settings", [SamplingParams(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("threshold", [None, 0.25, 0.5])
@pytest.mark.parametrize("length", [1, 2, 5, 15])
def test_self_speculative_equals_full_token_for_token(
    length: int, threshold: float | None, settings: SamplingParams
) -> None:
    """Some of the drafts are accepted and some are rejected."""
    config = tiny_config()
    tensors = _tensors(config, later=0.4)
    requests = [
        make_request(
            f"{boundary} {n}",
            n,
            "self-speculative",
            draft=SelfSpeculation(boundary, length, threshold),
            sampling=settings,
            max_tokens=16,
        )
        for boundary in (1, 2)
        for n in (1, 4, 6, 9)
    ]
    made, sequences = serve(make_engine(config, tensors=tensors, num_blocks=129), requests)
    for request, generation in zip(requests, made, strict=True):
        assert_same(generation, dense(request, config, tensors))
    num_drafted = sum(sequence.num_drafted for sequence in sequences)
    num_accepted = sum(sequence.num_accepted for sequence in sequences)
    assert 0 < num_accepted < num_drafted
    assert sum(sequence.num_rejections for sequence in sequences) > 0
    for generation, sequence in zip(made, sequences, strict=True):
        assert generation.num_drafted == sequence.num_drafted
        assert generation.num_accepted == sequence.num_accepted


@pytest.mark.parametrize(
    "settings", [SamplingParams(), DRAWN, SamplingParams(repetition_penalty=1.4)]
)
def test_drafts_of_an_exit_equal_to_the_final_exit_are_all_accepted(
    settings: SamplingParams,
) -> None:
    """The draft must sample with the noise of the final exit; other noise wastes drafts."""
    config = tiny_config()
    tensors = _tensors(config, later=0.0)
    requests = [
        make_request(
            f"{n}",
            n,
            "self-speculative",
            draft=SelfSpeculation(1, 5),
            sampling=settings,
            max_tokens=12,
        )
        for n in (1, 4, 9)
    ]
    engine = make_engine(config, tensors=tensors)
    made, sequences = serve(engine, requests)
    for request, generation, sequence in zip(requests, made, sequences, strict=True):
        assert_same(generation, dense(request, config, tensors))
        assert sequence.num_drafted == sequence.num_accepted == 10  # two passes of six tokens each
    assert engine.scheduler.step == 2 * 6


def test_drafting_continues_while_the_exit_is_confident() -> None:
    """A threshold that every row reaches has no effect; one that none reaches drafts nothing."""
    drafts = {}
    for threshold in (None, 1e-9, 0.3, 0.5, 1.0):
        request = make_request(
            "a", 4, "self-speculative", draft=SelfSpeculation(1, 4, threshold), max_tokens=25
        )
        (made,), _ = serve(make_engine(), [request])
        drafts[threshold] = made.num_drafted
    assert drafts[None] == drafts[1e-9] > drafts[0.3] > drafts[0.5] > drafts[1.0] == 0


def _exact_distribution(config: Config, prompt: list[int]) -> list[float]:
    """Return the distribution of the second new token, summed over all first tokens."""
    model = ReferenceModel(config, _tensors(config, later=0.6), torch.float64)

    def distribution(tokens: list[int]) -> torch.Tensor:
        return model.forward(torch.tensor(tokens))[model.num_layers][-1].softmax(dim=0)

    first = distribution(prompt)
    second = [distribution([*prompt, token]) for token in range(config.model.vocab_size)]
    return (first @ torch.stack(second)).tolist()


def _p_value(counts: Counter[int], distribution: list[float]) -> float:
    """Return the p-value of Pearson's chi-square test of the counts.

    The upper tail of the statistic is the incomplete gamma function. The degrees of freedom are the
    number of tokens minus one.
    """
    total = counts.total()
    expected = [total * share for share in distribution]
    assert min(expected) > 10, "too few for the approximation"
    statistic = sum((counts[token] - n) ** 2 / n for token, n in enumerate(expected))
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _sampled() -> tuple[list[RequestOutput], float]:
    """Return the generations of many seeds, and the p-value of their second tokens."""
    engine = make_engine(SMALL, tensors=_tensors(SMALL, later=0.6), max_num_seqs=64, num_blocks=129)
    prompt = [3, 1, 4]
    made = engine.generate(
        [
            make_request(
                str(seed),
                strategy="self-speculative",
                prompt=prompt,
                draft=SelfSpeculation(1, 2),
                boundaries=(1,),
                thresholds=(None,),
                sampling=SamplingParams(temperature=1.0, seed=seed),
                max_tokens=3,
            )
            for seed in range(NUM_SEEDS)
        ]
    )
    second = Counter(generation.token_ids[1] for generation in made)
    return made, _p_value(second, _exact_distribution(SMALL, prompt))


@pytest.mark.thorough
def test_sampled_tokens_follow_the_distribution_of_the_model() -> None:
    """Drafts must not change the distribution towards that of the exit.

    With random seeds, the test would fail by p_value once in a million runs.
    """
    made, p_value = _sampled()
    num_drafted = sum(generation.num_drafted for generation in made)
    share = sum(generation.num_accepted for generation in made) / num_drafted
    assert num_drafted > NUM_SEEDS
    assert 0.2 < share < 0.8, "drafts must be accepted, and rejected"
    assert p_value > FALSE_ALARM


def _same_noise_at_every_position(monkeypatch) -> None:
    """Plant a bug: the second token uses the noise of the first."""

    def draw(logits, settings, positions, histories):
        return sampler.draw(logits, settings, [0] * len(positions), histories)

    monkeypatch.setattr(decision, "draw", draw)


def _accept_all_drafts(monkeypatch) -> None:
    """Plant a bug: all drafts are accepted."""
    settle = Sequence.apply

    def accepting(self: Sequence, segment: int, result: ExitResult) -> bool:
        follows = result.position + 1
        if segment == len(self.boundaries) - 1 and follows < len(self.tokens):
            result = replace(result, token=self.tokens[follows])
        return settle(self, segment, result)

    monkeypatch.setattr(Sequence, "apply", accepting)


@pytest.mark.thorough
@pytest.mark.parametrize("plant", [_same_noise_at_every_position, _accept_all_drafts])
def test_the_test_of_the_distribution_finds_a_planted_bug(plant, monkeypatch) -> None:
    plant(monkeypatch)
    assert _sampled()[1] < FALSE_ALARM


def test_the_p_value_is_that_of_the_tables() -> None:
    """With 5 degrees of freedom, the probability of more than 20.515 is 1/1000."""
    shift = round(math.sqrt(20.515 * 1e6 / 2))
    counts = Counter(dict.fromkeys(range(6), 10**6))
    counts[0] += shift
    counts[1] -= shift
    assert _p_value(counts, [1 / 6] * 6) == pytest.approx(1e-3, rel=1e-2)
