"""Evaluations on tensor- and pipeline-parallel ranks equal those of one process, in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ee_llm
from ee_llm.checkpoint.gates import fingerprint_with_gates, read_gates, write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from ee_llm.errors import RunError, UserError
from ee_llm.evaluation import averages
from ee_llm.evaluation.result import EvaluationResult
from ee_llm.inference.choices import Measure
from tests.distributed.harness import run_ranks
from tests.unit.evaluation.models import make_config, make_tensors, save, write_data
from tests.unit.inference.models import random_gates, save_model

BLOCK = 7  # short, so that the data have enough blocks for errors
LAYOUTS = [(2, 1), (1, 2), (1, 4), (2, 2)]
CALIBRATED: tuple[Measure, ...] = ("gate", "agreement", "shortlist")
MODELS: dict[str, dict[str, Any]] = {
    "shared": {"boundaries": (1, 2, 3), "temperatures": (1.5, 1.0, 0.5)},
    "own": {"boundaries": (1, 3), "output": "own", "head": ("block", "mlp", "norm")},
    "tied": {"output": "tied", "tie_embeddings": True},
    "no exits": {"boundaries": ()},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data."""
    path = tmp_path_factory.mktemp("place")
    for name, options in MODELS.items():
        save(path / name, make_config(mask_after_eos=True, **options))
    write_data(path / "data")
    return path


def evaluate(place: Path, model: str, **arguments: Any) -> EvaluationResult:
    defaults: dict[str, Any] = {"data": place / "data", "seq_length": 9, "dtype": "float64"}
    return ee_llm.evaluate(place / model, **{**defaults, **arguments})


def assert_close(found: EvaluationResult, expected: EvaluationResult) -> None:
    """Assert equality up to the rounding of sums over ranks."""
    assert found.num_tokens == expected.num_tokens
    assert [one.boundary for one in found.exits] == [one.boundary for one in expected.exits]
    for one, other in zip(found.to_dict()["exits"], expected.to_dict()["exits"], strict=True):
        for name, value in other.items():
            close = value if value is None else pytest.approx(value, rel=1e-11, abs=1e-13)
            assert one[name] == close, name


def _on_rank(place: Path, model: str, tensor: int, pipeline: int) -> EvaluationResult:
    torch.set_num_threads(1)
    averages.BLOCK = BLOCK
    return evaluate(place, model, tensor=tensor, pipeline=pipeline, timeout_s=30)


def _calibrate(place: Path, tensor: int, pipeline: int) -> list[dict[str, Any]]:
    """Return a calibration for every kind of measure of confidence."""
    torch.set_num_threads(1)
    return [
        ee_llm.calibrate(
            place / "calibrated",
            data=place / "data",
            seq_length=2,
            dtype="float64",
            risk=0.5,
            delta=0.5,
            measure=measure,
            tensor=tensor,
            pipeline=pipeline,
            timeout_s=30,
        ).to_dict()
        for measure in CALIBRATED
    ]


def test_calibration_over_ranks_equals_that_of_one_process(place: Path) -> None:
    """The last stage chooses, and every rank gets its choice.

    Some confidences are measured on the stage of the exit, others compare exits of several stages.
    """
    config = make_config(boundaries=(1, 2, 3), output="own")
    save(place / "calibrated", config)
    write_gates(TensorReader(place / "calibrated"), random_gates(config))
    expected = _calibrate(place, 1, 1)
    assert sum(any(t is not None for t in one["thresholds"]) for one in expected) > 1
    for results in run_ranks(4, _calibrate, place, 2, 2, timeout_s=240):
        for found, wanted in zip(results, expected, strict=True):
            for bins, others in zip(found["reliability"], wanted["reliability"], strict=True):
                assert bins == [pytest.approx(one, rel=1e-6) for one in others]
            for name, value in wanted.items():
                if name == "reliability":
                    continue
                is_number = isinstance(value, float) or name in ("shares", "calibration_errors")
                same = pytest.approx(value, rel=1e-6) if is_number else value
                assert found[name] == same, (wanted["measure"], name)


def _train_gates(place: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return ee_llm.calibrate(
        place / "gated",
        data=place / "long",
        seq_length=16,
        dtype="float64",
        risk=0.5,
        delta=0.5,
        train_gate=True,
        gate_tokens=1100,
        tensor=tensor,
        pipeline=pipeline,
        timeout_s=60,
    ).to_dict()


def test_ranks_train_gates(place: Path) -> None:
    """Hidden states of all stages reach the last one, and the first rank writes the gates."""
    run = save(place / "gated", make_config(boundaries=(1, 2, 3), output="own"))
    write_data(
        place / "long", [[*(f"{n} the quick brown fox. " * 3).encode(), 256] for n in range(30)]
    )
    results = run_ranks(4, _train_gates, place, 2, 2, timeout_s=240)
    assert all(found == results[0] for found in results), "all ranks get the result"
    over_ranks = read_gates(TensorReader(run))
    assert results[0]["fingerprint"] == fingerprint_with_gates(TensorReader(run))
    alone = _train_gates(place, 1, 1)
    assert alone["gates"] == [pytest.approx(one, rel=0.05) for one in results[0]["gates"]]
    for name, tensor in read_gates(TensorReader(run)).items():
        torch.testing.assert_close(over_ranks[name], tensor, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_ranks_equal_one_process(
    monkeypatch: pytest.MonkeyPatch, place: Path, model: str, tensor: int, pipeline: int
) -> None:
    """Exits on all stages, in groups that no stage or only some stages have."""
    found = run_ranks(tensor * pipeline, _on_rank, place, model, tensor, pipeline)
    monkeypatch.setattr(averages, "BLOCK", BLOCK)
    expected = evaluate(place, model)
    assert expected.final.loss_error is not None
    for result in found:
        assert result == found[0], "all ranks get the result"
        assert_close(result, expected)


def _with_nan(place: Path, tensor: int, pipeline: int) -> str:
    torch.set_num_threads(1)
    try:
        evaluate(place, "nan", tensor=tensor, pipeline=pipeline, timeout_s=30)
    except RunError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_loss_that_is_not_finite_ends_all_ranks(place: Path, tensor: int, pipeline: int) -> None:
    config = make_config(output="own")
    tensors = make_tensors(config)
    tensors["exits.1.output.weight"][5] = float("nan")
    save_model(place / "nan", config, tensors)
    found = run_ranks(tensor * pipeline, _with_nan, place, tensor, pipeline)
    assert "exit after layer 1 is not finite" in found[-1]
    assert all(message.startswith(("RunError", "RankLostError")) for message in found)


@pytest.mark.parametrize("options", [("--tensor", "2"), ("--pipeline", "2")])
def test_command_starts_ranks_and_prints_once(place: Path, options: tuple[str, str]) -> None:
    command = ("evaluate", "shared", "--data", "data", "--seq-length", "9", "--dtype", "float64")
    files = ("--json", "result.json", "--plot", "exits.svg")
    done = subprocess.run(
        [sys.executable, "-m", "ee_llm", *command, *options, *files],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("layer 4 (final)") == 1
    assert done.stdout.endswith("\nwrote result.json, exits.svg\n")
    found = EvaluationResult.from_dict(json.loads((place / "result.json").read_text()))
    assert_close(found, evaluate(place, "shared"))
    assert (place / "exits.svg").is_file()


@pytest.mark.parametrize("options", [("--tensor", "2"), ("--pipeline", "2")])
def test_ranks_fit_the_temperatures_of_one_process(
    place: Path, options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The exits are on both stages, and the first rank writes the checkpoint."""
    run = place / "scaled"
    if not run.exists():
        save(run, make_config(boundaries=(1, 3), output="own", temperatures=(0.4, 1.5)))
        write_data(
            place / "many", [[*f"{n} the quick brown fox. ".encode(), 256] for n in range(60)]
        )
    given = ["checkpoint", "fit-temperatures", str(run), "--data", str(place / "many"), "--json"]
    given += ["--seq-length", "32", "--dtype", "float64", "--output"]
    assert main([*given, str(place / f"alone{options[0]}")]) == 0
    expected = json.loads(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-m", "ee_llm", *given, str(place / f"ranks{options[0]}"), *options],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exits"] == [pytest.approx(one, rel=1e-4) for one in expected["exits"]]
    written = TensorReader(found["output"]).config().exits.temperatures
    assert written == tuple(one["new"] for one in found["exits"])


def test_api_starts_ranks(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = evaluate(place, "shared", pipeline=2, num_tokens=90)
    assert_close(found, evaluate(place, "shared", num_tokens=90))
    assert capfd.readouterr().out == "", "the ranks do not print"
    with pytest.raises(UserError, match="token ids 1 to 300"):
        evaluate(place, "shared", pipeline=2, data=write_data(place / "far", [[1, 300]]))
    assert capfd.readouterr() == ("", "")
