"""`ee-llm checkpoint fit-temperatures`: the fit, the checkpoint that it writes, and its errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ee_llm
from ee_llm.checkpoint.gates import GATES, write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import with_options
from ee_llm.cli.main import main
from ee_llm.errors import RequestError
from ee_llm.evaluation.reliability import Reliability, calibration_error
from tests.unit.checkpoint.surgery import sources
from tests.unit.evaluation.models import (
    TOKENS,
    make_config,
    make_tensors,
    reference,
    save,
    write_data,
)
from tests.unit.inference.models import random_gates, save_model

pytestmark = pytest.mark.thorough

SEQ_LENGTH = 32
DOCUMENT = TOKENS * 6
SHAPE: dict[str, Any] = {"boundaries": (1, 2, 3), "output": "own"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and one model with several temperatures."""
    path = tmp_path_factory.mktemp("place")
    save(path / "plain", make_config(**SHAPE))
    save(path / "planted", make_config(**SHAPE, temperatures=(0.4, 1.7, 2.5)))
    save(path / "dense", make_config(boundaries=()))
    write_data(path / "data", [DOCUMENT])
    write_data(path / "short", [DOCUMENT[:500]])
    return path


def fit(source: Path, data: Path, output: Path, capsys: Any) -> dict[str, Any]:
    """Return what the command prints for a model."""
    options = ["--data", str(data), "--seq-length", str(SEQ_LENGTH), "--json"]
    options += ["--dtype", "float64", "--output", str(output)]
    assert main(["checkpoint", "fit-temperatures", str(source), *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def by_hand(place: Path, model: str) -> tuple[dict[int, Tensor], Tensor]:
    """Return the logits [t, v] of each exit, and the final exit's most probable tokens [t]."""
    model_ = reference(TensorReader(place / model).config())
    windows = [DOCUMENT[i : i + SEQ_LENGTH] for i in range(0, len(DOCUMENT) - 1, SEQ_LENGTH)]
    if len(windows[-1]) + sum(map(len, windows[:-1])) == len(DOCUMENT):
        windows[-1] = windows[-1][:-1]  # The last token is only predicted.
    found = [model_.forward(torch.tensor(window)) for window in windows if window]
    logits = {b: torch.cat([one[b] for one in found]) for b in found[0]}
    return logits, logits[4].argmax(dim=-1)


def error_of(logits: Tensor, labels: Tensor) -> float:
    confidence, top = logits.softmax(dim=-1).max(dim=-1)
    reliability = Reliability()
    reliability.add_tokens(1, confidence, (top == labels).double())
    return calibration_error(reliability.bins()[1]) or 0.0


def test_fit_is_the_best_temperature(place: Path, tmp_path: Path, capsys: Any) -> None:
    """Against the cross entropy of each exit's logits, in float64."""
    found = fit(place / "planted", place / "data", tmp_path / "new", capsys)
    logits, labels = by_hand(place, "planted")
    assert found["num_tokens"] == len(labels)
    for one in found["exits"]:
        assert one["is_bracketed"], "the test needs exits with a best temperature"
        rows, factor = logits[one["boundary"]], one["new"] / one["old"]

        def loss(temperature: float, rows: Tensor = rows) -> float:
            return float(torch.nn.functional.cross_entropy(rows / temperature, labels))

        least = loss(factor)
        assert least < min(loss(0.99 * factor), loss(1.01 * factor))
        assert one["loss_after"] == pytest.approx(least, rel=1e-4)
        assert one["loss_before"] == pytest.approx(loss(1.0), rel=1e-6)
        assert one["error_before"] == pytest.approx(error_of(rows, labels), abs=1e-6)
        assert one["error_after"] == pytest.approx(error_of(rows / factor, labels), abs=0.01)
        assert one["error_after"] < one["error_before"]
        assert one["agreement"] == pytest.approx(float((rows.argmax(-1) == labels).double().mean()))


def test_existing_temperatures_do_not_change_the_fit(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    """Planted temperatures are found again, and a second fit changes nothing."""
    plain = fit(place / "plain", place / "data", tmp_path / "plain", capsys)
    planted = fit(place / "planted", place / "data", tmp_path / "planted", capsys)
    again = fit(tmp_path / "plain", place / "data", tmp_path / "again", capsys)
    for first, other, second in zip(plain["exits"], planted["exits"], again["exits"], strict=True):
        assert first["old"] == 1.0 != other["old"]
        assert first["new"] == pytest.approx(other["new"], rel=5e-4)
        assert second["old"] == first["new"]
        assert second["new"] == pytest.approx(second["old"], rel=5e-4)
        assert second["error_before"] == pytest.approx(first["error_after"], abs=0.01)


def test_nothing_but_the_temperatures_changes(place: Path, tmp_path: Path, capsys: Any) -> None:
    """A run resumes from the new checkpoint, and gates are left behind, since they name a model."""
    source = sources.save(tmp_path / "source", sources.tiny(boundaries=(1, 3)))
    write_gates(source, random_gates(source.config()))
    found = fit(source.path, place / "data", tmp_path / "new", capsys)
    new = TensorReader(tmp_path / "new")
    assert found["output"] == str(new.path)
    temperatures = tuple(one["new"] for one in found["exits"])
    assert 1.0 not in temperatures
    expected = with_options(source.config(), exits={"temperatures": temperatures})
    assert new.config().model_dump(exclude={"output"}) == expected.model_dump(exclude={"output"})
    sources.assert_same(sources.all_tensors(new), sources.all_tensors(source))
    sources.assert_resumes_alike(new, source)
    assert (source.path / GATES).is_file()
    assert not (new.path / GATES).exists()


def test_policies_of_the_old_checkpoint_are_refused(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    """Their thresholds are for other confidences."""
    found = fit(place / "plain", place / "data", tmp_path / "new", capsys)
    assert "Run 'ee-llm calibrate' again" in found["notes"][-1]
    old = TensorReader(place / "plain").fingerprint()
    policy = ee_llm.ExitPolicy((1, 2, 3), (0.5, 0.5, 0.5))
    policy.save(tmp_path / "policy.json", {"fingerprint": old})
    with ee_llm.LLM(place / "plain", exits=tmp_path / "policy.json", dtype="float64"):
        pass
    # The planted model differs in nothing but the temperatures.
    for other in (tmp_path / "new", place / "planted"):
        with pytest.raises(RequestError, match=f"calibrated .* fingerprint {old}"):
            ee_llm.LLM(other, exits=tmp_path / "policy.json", dtype="float64")


def test_exit_that_always_agrees_has_no_best_temperature(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    """It is made as confident as the search goes, with a warning; the others are fitted."""
    config = make_config(**SHAPE)
    tensors = make_tensors(config)
    last = [name for name in tensors if name.startswith("layers.4.")]
    tensors |= {name: torch.zeros_like(tensors[name]) for name in last}
    tensors["exits.3.norm.weight"] = tensors["exits.4.norm.weight"]
    tensors["exits.3.output.weight"] = tensors["output.weight"]
    source = save_model(tmp_path / "source", config, tensors)
    data = str(place / "data")
    given = ["checkpoint", "fit-temperatures", str(source), "--data", data, "--dtype", "float64"]
    given += ["--seq-length", str(SEQ_LENGTH), "--output", str(tmp_path / "new")]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "note: exit after layer 3: the best temperature is below 1/8 of the old one" in shown
    assert "agrees with the final exit for 100.0% of tokens" in shown
    assert "exit after layer 1: the best" not in shown
    temperatures = TensorReader(tmp_path / "new").config().exits.temperatures
    assert temperatures[2] == 0.125
    assert len({1.0, *temperatures}) == 4
    rows = [line.split() for line in shown.splitlines() if line.startswith("layer ")]
    assert [row[1] for row in rows] == ["1", "2", "3"]
    assert [float(row[3]) for row in rows] == pytest.approx(temperatures, rel=1e-3)


REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no exits": ("dense", ("--data", "data"), "dense has no early exits"),
    "no text": ("plain", (), "there is no text to evaluate. Give data (--data)"),
    "too short": ("plain", ("--data", "short"), "the text has 499 tokens, too few to fit"),
    "too few": ("plain", ("--data", "data", "--num-tokens", "9"), "num_tokens = 9 is too small"),
    "output exists": ("plain", ("--data", "data", "--output", "planted"), "already exists."),
    "tensor": ("plain", ("--data", "data", "--tensor", "3"), "tensor = 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes(
    place: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, options, message = REFUSED[case]
    monkeypatch.chdir(place)
    output = () if "--output" in options else ("--output", "new")
    command = ["checkpoint", "fit-temperatures", model, "--seq-length", "32", *options, *output]
    assert main(command) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (place / "new").exists()


def test_quantized_checkpoints_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything else, such as the missing text, because they serve inference only."""
    quantized = ["convert", str(place / "plain"), "--to", "int8", "--output", str(tmp_path / "q")]
    assert main(quantized) == 0
    capsys.readouterr()
    given = [str(tmp_path / "q"), "--output", str(tmp_path / "new")]
    assert main(["checkpoint", "fit-temperatures", *given]) == 2
    assert "has 8-bit weights" in capsys.readouterr().err
