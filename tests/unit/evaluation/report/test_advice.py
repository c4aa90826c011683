"""The advice of a report: what was measured, and no more."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ee_llm.evaluation.calibration.options import Metric
from ee_llm.evaluation.calibration.result import CalibrationResult
from ee_llm.evaluation.reliability import ReliabilityBin
from ee_llm.evaluation.report.advice import advise
from ee_llm.evaluation.report.content import Calibrated, ReportContent, SampleDecoding
from ee_llm.evaluation.report.options import ReportOptions
from ee_llm.evaluation.result import EvaluationResult, ExitMetrics
from ee_llm.inference.exits.policy import ExitPolicy
from tests.unit.evaluation.models import make_config
from tests.unit.evaluation.sweep.test_result import point, result

BOUNDARIES = (8, 16)
POLICY = ExitPolicy(BOUNDARIES, (0.8, None))
CALIBRATION = CalibrationResult(
    checkpoint="runs/tuned",
    fingerprint="0" * 16,
    inputs=("data",),
    text_digest="0" * 16,
    num_layers=24,
    boundaries=BOUNDARIES,
    thresholds=(0.8, None),
    measure="max_probability",
    metric="agreement",
    risk=0.05,
    delta=0.1,
    loss=0.03,
    p_value=0.01,
    shares=(0.5, 0.0, 0.5),
    heads=1.5,
    cost=20.0,
    full_cost=24.0,
    head_cost=1.0,
    least_final_share=None,
    num_windows=100,
    num_tokens=10_000,
    seq_length=100,
    calibration_errors=(0.1, 0.1),
    reliability=(),
    dtype="float32",
)


def metrics(boundary: int, agreement: float, confidence: float) -> ExitMetrics:
    return ExitMetrics(
        boundary, boundary == 24, 2.0, None, None, agreement, None, None, 0.1, confidence
    )


def content(
    agreement: float = 0.8,
    confidence: float = 0.8,
    bins: tuple[ReliabilityBin, ...] = (),
    num_tokens: int = 5000,
    **given: Any,
) -> ReportContent:
    exits = (metrics(8, agreement, confidence), metrics(16, 0.9, 0.9), metrics(24, 1.0, 0.9))
    return ReportContent(
        options=ReportOptions(Path("runs/tuned"), data=("held-out",)),
        fingerprint="0" * 16,
        config=make_config(num_layers=24, boundaries=BOUNDARIES),
        evaluation=EvaluationResult("runs/tuned", ("data",), num_tokens, 32, "float32", exits),
        reliability={8: bins},
        **{"sweep": None, "calibration": None, **given},
        decoding=SampleDecoding("nothing", POLICY, "exact"),
        samples=(),
    )


def text_of(found: ReportContent) -> str:
    return "\n".join(advice.text for advice in advise(found))


PROMISED: dict[Metric, str] = {
    "agreement": "at most 5.000% of tokens disagree with the final exit, on average over windows",
    "perplexity": "the perplexity rises by at most 5.000%, on average over windows of text from",
    "task": "at most 5.000% of the answers that the final exit gives right are lost, on average",
}


@pytest.mark.parametrize("metric", PROMISED)
def test_the_guarantee_is_that_of_the_metric(metric: Metric) -> None:
    calibrated = Calibrated(Path("p.json"), POLICY, replace(CALIBRATION, metric=metric))
    text = text_of(content(calibration=calibrated))
    assert (
        f"With probability 0.9 over the choice of the text of the calibration, {PROMISED[metric]}"
        in text
    )
    assert ("true tokens before it; generated text is not covered" in text) == (metric != "task")
    for other, words in PROMISED.items():
        assert (words in text) == (other == metric)


def test_a_policy_without_a_calibration_has_no_guarantee() -> None:
    text = text_of(content(calibration=Calibrated(Path("p.json"), POLICY, None)))
    assert "The policy file p.json has no guarantee." in text


MISLEADING = (ReliabilityBin(2500, 0.6, 0.95), ReliabilityBin(2500, 1.0, 0.65))
HIGH = (ReliabilityBin(5000, 0.95, 0.7),)
LOW = (ReliabilityBin(5000, 0.5, 0.8),)


@pytest.mark.parametrize(
    ("bins", "agreement", "confidence", "expected"),
    [
        (MISLEADING, 0.8, 0.8, "misleading, too high for some tokens and too low for others"),
        (HIGH, 0.7, 0.95, "too high: on average, it is 0.95"),
        (LOW, 0.8, 0.5, "too low: on average, it is 0.50"),
    ],
)
def test_the_direction_of_the_confidence_is_named_if_there_is_one(
    bins: tuple[ReliabilityBin, ...], agreement: float, confidence: float, expected: str
) -> None:
    assert f"exit 8 is {expected}" in text_of(content(agreement, confidence, bins))


def test_few_tokens_are_no_ground_for_advice_on_exits() -> None:
    found = content(0.4, 0.9, (ReliabilityBin(999, 0.9, 0.4),), num_tokens=999)
    text = text_of(found)
    assert "999 tokens, too few to judge the exits and their confidence. Use 1,000 or more" in text
    assert "Exit 8" not in text
    assert "of exit 8" not in text


def test_exits_are_removed_for_measured_shares_only() -> None:
    """An exit with an agreement below a half can still decide many easy tokens."""
    rare = text_of(content(agreement=0.3))
    assert "Exit 8 agrees with the final exit on only 30.0% of tokens." in rare
    assert "emove" not in rare
    calibrated = Calibrated(Path("p.json"), POLICY, CALIBRATION)
    text = text_of(content(agreement=0.3, calibration=calibrated))
    assert "Exit 16 decides 0.0% of tokens under the calibrated policy." in text
    assert "Exit 8 decides" not in text
    both = ExitPolicy(BOUNDARIES, (0.8, 0.8))
    used = point("both", 1.5, 1.0, thresholds=both.thresholds, shares=(0.001, 0.5, 0.499))
    text = text_of(content(calibration=calibrated, sweep=result(used)))
    assert "decides" not in text, "each exit is used by one of the policies"
    text = text_of(content(sweep=result(used)))
    assert "Exit 8 decides 0.1% of tokens under the recommended point of the sweep." in text


def test_policies_without_exits_are_no_ground_to_remove_them() -> None:
    off = ExitPolicy(BOUNDARIES, (None, None))
    closed = replace(CALIBRATION, thresholds=off.thresholds, shares=(0.0, 0.0, 1.0))
    text = text_of(content(calibration=Calibrated(Path("p.json"), off, closed), sweep=result()))
    assert "All exits of this policy are off, so it saves nothing." in text
    assert "emove" not in text


def test_a_calibration_survives_json() -> None:
    record = json.loads(json.dumps(CALIBRATION.to_dict()))
    assert CalibrationResult.from_dict(record) == CALIBRATION
