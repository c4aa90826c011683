"""The benchmarks of calibrations and gates on a tiny model: what they run and what they write."""

import json
import math
from pathlib import Path

import pytest

import ee_llm
from tests.unit.evaluation.models import make_config, save, write_data
from tools.bench import calibration, gates
from tools.bench.calibrated_generation import (
    Behaviour,
    Mean,
    Prompts,
    generate,
    is_within,
    mean_per_token,
    predict,
)

pytestmark = pytest.mark.thorough

TEXTS = [f"{number} The quick brown fox jumps over the lazy dog. " * 4 for number in range(60)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("place")
    save(path / "run", make_config(boundaries=(1, 2, 3), output="own"))
    write_data(path / "data", [[*text.encode(), 256] for text in TEXTS])
    return path


def test_calibrations_keep_their_risk(place: Path) -> None:
    options = calibration.Options(
        checkpoint=place / "run",
        data=str(place / "data"),
        num_tokens=6000,
        seq_length=32,
        risk=0.3,
        delta=0.2,
        head_cost=0.1,
        resamplings=20,
        num_windows=80,
        num_prompts=24,
        prompt_length=8,
        json=place / "calibration.json",
    )
    calibration.main(options)
    written = json.loads((place / "calibration.json").read_text())
    assert written["figures"]["risk_violation_rate"] <= options.delta
    assert written["figures"]["saving_per_exit"] > 0
    *rows, predicted, generated = written["rows"]
    for name, low, high in (("depth", 1, 4), ("disagreement", 0, 1)):
        assert low <= predicted[name]["value"] <= high
        assert predicted[name]["error"] > 0
        difference = abs(predicted[name]["value"] - generated[name]["value"])
        assert difference <= 4 * (predicted[name]["error"] + generated[name]["error"])
    assert [row["seed"] for row in rows] == list(range(20))
    assert len({json.dumps(row["per_exit_thresholds"]) for row in rows}) > 1
    for row in rows:
        assert len(set(row["uniform_thresholds"])) == 1, "one threshold for all exits"


def test_figures_of_calibrations_by_hand() -> None:
    rows = [
        {"per_exit_risk": r, "per_exit_saving": s, "uniform_saving": u}
        for r, s, u in ((0.04, 0.3, 0.1), (0.06, 0.1, 0.1), (0.05, 0.2, 0.1), (0.01, 0.0, 0.1))
    ]
    found = calibration.figures_of(rows, 0.05)
    assert found["risk_violation_rate"] == 0.25
    assert found["saving_over_uniform"] == pytest.approx(1.5)


def test_behaviours_by_hand() -> None:
    one = mean_per_token([2.0, 6.0], [2, 2])
    assert one.value == 2.0
    assert one.error == pytest.approx(math.sqrt(2 * (2**2 + 2**2)) / 4)
    small, large = Mean(0.0, 0.3), Mean(1.0, 0.4)  # 1.0 is 2 errors of the difference.
    assert not is_within(Behaviour(large, small), Behaviour(small, small))
    assert not is_within(Behaviour(small, large), Behaviour(small, small))
    near = Mean(0.97, 0.4)
    assert is_within(Behaviour(near, near), Behaviour(small, small))


def test_predictions_are_those_of_generated_text(place: Path) -> None:
    """At full depth, and at the first exit, prediction and generation must be equal."""
    options = calibration.Options(seq_length=24, prompt_length=8)
    prompts = Prompts([[*text.encode()][:8] for text in TEXTS[:8]], 16)
    given = calibration.calibrate_options(options, place / "run", str(place / "data"))
    for thresholds, depth in (((None,) * 3, 4.0), ((None, 1e-9, None), 2.0)):
        policy = ee_llm.ExitPolicy((1, 2, 3), thresholds)
        found = [predict(given, policy, prompts), generate(place / "run", policy, prompts)]
        assert [one.depth for one in found] == [Mean(depth, 0.0)] * 2
        if depth == 4.0:
            assert [one.disagreement for one in found] == [Mean(0.0, 0.0)] * 2
        else:
            assert all(one.disagreement.value > 0.1 for one in found)


def test_gates_compute_one_head_per_token(place: Path) -> None:
    options = gates.Options(
        checkpoint=place / "run",
        data=str(place / "data"),
        gate_tokens=4000,
        num_tokens=8000,
        seq_length=32,
        risk=0.3,
        num_prompts=3,
        prompt_length=8,
        max_tokens=6,
        rounds=2,
        json=place / "gates.json",
    )
    gates.main(options)
    written = json.loads((place / "gates.json").read_text())
    assert written["figures"]["gate_heads_per_token"] == 1.0
    probability, gate = written["rows"]
    assert [probability["measure"], gate["measure"]] == ["max_probability", "gate"]
    for row in (probability, gate):
        assert row["predicted_disagreement"] <= 0.3
        assert len(row["seconds"]) == 2
    assert probability["heads"] > 1
