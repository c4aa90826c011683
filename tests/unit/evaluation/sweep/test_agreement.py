"""The agreement of generated tokens with the full model, and its confidence interval."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from ee_llm.evaluation import measure
from ee_llm.evaluation.sweep import agreement
from ee_llm.evaluation.sweep.agreement import (
    LEAST_CORRELATION,
    FullModel,
    TokenScores,
    agreement_of,
    correlation_of,
    mean_loss,
)
from tests.unit.evaluation.sweep.places import agreeing_config, agreeing_tensors
from tests.unit.inference.models import save_model


@pytest.mark.parametrize("max_logits", [measure.MAX_LOGITS, 264 * 3])
def test_scores_equal_those_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_logits: int
) -> None:
    """The last chunk of rows is shorter with the smaller limit."""
    monkeypatch.setattr(agreement, "MAX_LOGITS", max_logits)
    config = agreeing_config()
    tensors = agreeing_tensors(config)
    reader = TensorReader(save_model(tmp_path / "run", config, tensors))
    reference = ReferenceModel(config, tensors, torch.float64)
    prompt, generated = [*b"The quick"], []
    for step in range(8):  # tokens of the full model, but for two
        logits = reference.forward(torch.tensor([*prompt, *generated]))[config.model.num_layers]
        generated.append(7 if step in (2, 5) else int(logits[-1].argmax()))
    found = FullModel(reader, torch.float64, 32).score(tuple(prompt), tuple(generated))
    logits = reference.forward(torch.tensor([*prompt, *generated]))[config.model.num_layers]
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    assert found.num_tokens == 8
    assert found.num_agreeing == 6
    expected = -sum(float(row[token]) for row, token in zip(rows, generated, strict=True))
    assert found.loss == pytest.approx(expected, rel=1e-12)


def test_interval_of_independent_tokens_is_wilsons() -> None:
    """The values are those of Newcombe (1998), table I, for 81 of 263."""
    scores = [TokenScores(1, int(number < 81), 0.0) for number in range(263)]
    found = agreement_of(scores, 0.0)
    assert found.value == pytest.approx(81 / 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-4)


def test_interval_is_wider_if_generations_differ() -> None:
    alike = agreement_of([TokenScores(20, 15, 0.0)] * 10, 0.0)
    apart = agreement_of([TokenScores(20, 20, 0.0), TokenScores(20, 10, 0.0)] * 5, 0.0)
    assert alike.value == apart.value == 0.75
    assert apart.low < alike.low < 0.75 < alike.high < apart.high  # type: ignore[operator]


def test_interval_is_wider_if_tokens_of_other_points_are_correlated() -> None:
    """By hand: 128 tokens count as 128 / (1 + 0.5 * 31), and t = 3.1824 with 3 degrees."""
    found = agreement_of([TokenScores(32, 32, 0.0)] * 4, 0.5)
    assert (found.value, found.high) == (1.0, 1.0)
    size = 128 / 16.5
    assert found.low == pytest.approx(size / (size + 3.1824**2), abs=1e-4)


def test_one_generation_has_no_interval() -> None:
    found = agreement_of([TokenScores(32, 31, 0.0)], 0.1)
    assert (found.value, found.low, found.high) == (31 / 32, None, None)


def test_correlation_is_pooled_over_points() -> None:
    """Generations that agree entirely or not at all are fully correlated."""
    apart = [TokenScores(10, 10, 0.0), TokenScores(10, 0, 0.0)] * 50
    assert correlation_of([apart]) == pytest.approx(1.0, abs=0.02)
    alike = [TokenScores(10, 5, 0.0)] * 100
    assert LEAST_CORRELATION < correlation_of([apart, alike]) < 0.5
    perfect = [TokenScores(10, 10, 0.0)] * 4
    for unknown in ([alike], [perfect], [[TokenScores(10, 5, 0.0)]], []):
        assert correlation_of(unknown) == LEAST_CORRELATION


@pytest.mark.parametrize(
    ("share", "correlation"), [(0.99, 0.02), (0.99, 0.1), (0.99, 0.3), (0.95, 0.1), (0.9, 0.05)]
)
def test_intervals_cover_the_true_share(share: float, correlation: float) -> None:
    """16 generations of 64 tokens, by points that share their prompts; it used to be 82 %."""
    generator = np.random.default_rng(0)
    num_sweeps, num_points, num_covered = 100, 10, 0
    unit = (1 - correlation) / correlation
    for _ in range(num_sweeps):
        shares = generator.beta(share * unit, (1 - share) * unit, 16)
        counts = generator.binomial(64, shares, (num_points, 16))
        points = [[TokenScores(64, int(one), 0.0) for one in row] for row in counts]
        pooled = correlation_of(points)
        for found in (agreement_of(one, pooled) for one in points):
            assert found.low is not None
            assert found.high is not None
            num_covered += found.low <= share <= found.high
    assert num_covered / (num_sweeps * num_points) >= 0.92


def test_losses_are_averaged_over_tokens() -> None:
    assert mean_loss([TokenScores(1, 1, 2.0), TokenScores(3, 0, 4.0)]) == 1.5
