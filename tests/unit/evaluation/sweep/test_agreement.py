"""The agreement of generated tokens with the full model, and its confidence interval."""

from pathlib import Path

import pytest
import torch

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.read import TensorReader
from ee_llm.evaluation import measure
from ee_llm.evaluation.sweep import agreement
from ee_llm.evaluation.sweep.agreement import FullModel, TokenScores, agreement_of, pooled
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
    found = agreement_of(scores)
    assert found.value == pytest.approx(81 / 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-4)


def test_interval_is_wider_if_generations_differ() -> None:
    alike = agreement_of([TokenScores(20, 15, 0.0)] * 10)
    apart = agreement_of([TokenScores(20, 20, 0.0), TokenScores(20, 10, 0.0)] * 5)
    assert alike.value == apart.value == 0.75
    assert apart.low < alike.low < 0.75 < alike.high < apart.high


def test_interval_has_a_width_if_all_tokens_agree() -> None:
    found = agreement_of([TokenScores(32, 32, 0.0)] * 4)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(128 / (128 + 1.96**2), abs=1e-4)


def test_losses_are_averaged_over_tokens() -> None:
    assert pooled([TokenScores(1, 1, 2.0), TokenScores(3, 0, 4.0)])[1] == 1.5
