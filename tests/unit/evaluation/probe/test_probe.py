"""A probe's figures against those of checkpoints that have the same exits."""

import json
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import ee_llm
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.main import main
from ee_llm.errors import DataError, RequestError
from ee_llm.evaluation.probe.costs import weight_ratios
from ee_llm.evaluation.probe.result import ProbeResult
from tests.unit.evaluation.probe.models import LENGTH, make_place

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def probe(place: Path, model: str = "dense", **given: Any) -> ProbeResult:
    options: dict[str, Any] = {"seq_length": LENGTH, "costs": "weights", "progress": False}
    if "text" not in given:
        options |= {"data": place / "test", "fit_data": place / "fit"}
    return ee_llm.probe(place / model, **{**options, **given})


@pytest.fixture(scope="module")
def result(place: Path) -> ProbeResult:
    return probe(place)


def with_exits(place: Path, output: Path, *options: object) -> Path:
    command = ["checkpoint", "add-exits", place / "dense", "--output", output, "--exits", "1,2,3"]
    assert main([str(one) for one in (*command, *options)]) == 0
    return output


def test_metrics_are_those_of_a_checkpoint_with_these_exits(
    place: Path, result: ProbeResult, tmp_path: Path
) -> None:
    data = ("--data", place / "fit", "--seq-length", LENGTH)
    fitted = with_exits(
        place, tmp_path / "fitted", "--initialization", "least-squares", *data,
        "--num-tokens", result.num_fit_tokens,
    )  # fmt: skip
    bare = with_exits(place, tmp_path / "bare", "--head", "norm")
    text = {"data": place / "test", "seq_length": LENGTH, "dtype": "float64", "progress": False}
    text["num_tokens"] = result.num_tokens
    expected, expected_bare = ee_llm.evaluate(fitted, **text), ee_llm.evaluate(bare, **text)
    assert [one.boundary for one in result.boundaries] == [1, 2, 3]
    assert len({one.agreement for one in result.boundaries}) == 3
    for found in result.boundaries:
        one = expected.exit(found.boundary)
        assert found.agreement == pytest.approx(one.agreement)
        assert found.agreement_margin == pytest.approx(one.agreement_margin)
        assert found.loss == pytest.approx(one.loss, rel=1e-6)
        assert found.confidence == pytest.approx(one.confidence, rel=1e-5)
        assert found.bare_agreement == expected_bare.exit(found.boundary).agreement
    assert result.final_loss == pytest.approx(expected.final.loss)


def test_exits_of_the_checkpoint_are_ignored(place: Path, result: ProbeResult) -> None:
    found = probe(place, "exits", risk=0.3)
    assert found.existing_exits == (1, 3)
    assert found.boundaries == result.boundaries
    remove, add = found.next_commands
    assert remove.startswith("ee-llm checkpoint remove-exits")
    assert "--exits 1 3 " in remove
    assert add.startswith("ee-llm checkpoint add-exits runs/backbone --exits ")


def test_layers_that_change_nothing_are_found_and_can_be_cut(
    place: Path, result: ProbeResult, tmp_path: Path
) -> None:
    found = probe(place, "identities")
    assert found.num_needed_layers == 2
    assert [one.bare_agreement for one in found.boundaries][1:] == [1.0, 1.0]
    assert found.boundaries[0].bare_agreement < 1
    assert "Layers 3 to 4 change no prediction: for all 2,299 tokens" in repr(found)
    exits = ("--exits", "2", "--head", "norm", "--output", str(tmp_path / "exits"))
    assert main(["checkpoint", "add-exits", str(place / "identities"), *exits]) == 0
    cut = ("--truncate-at", "2", "--output", str(tmp_path / "shorter"))
    assert main(["convert", str(tmp_path / "exits"), *cut]) == 0
    text = {"data": place / "test", "seq_length": LENGTH, "dtype": "float64", "progress": False}
    shorter = ee_llm.evaluate(tmp_path / "shorter", **text, num_tokens=found.num_tokens)
    assert shorter.final.boundary == 2
    assert shorter.final.loss == pytest.approx(found.final_loss)
    assert result.num_needed_layers == 4
    assert "change no prediction" not in repr(result)


def test_a_model_with_little_to_skip_is_said_to_be_one(place: Path) -> None:
    found = probe(place, risk=1e-6)
    assert found.best.saving < 0.05
    assert "This model has little to skip: no exit saves anything if" in repr(found)
    assert found.next_commands == []


def test_parts_of_one_text_do_not_overlap(place: Path) -> None:
    """The first windows fit and the next ones test, as with two texts."""
    options = {"data": place / "both", "fit_data": (), "num_fit_tokens": 1001, "num_tokens": 500}
    found = probe(place, **options)
    assert (found.num_fit_tokens, found.num_tokens) == (1008, 500)
    one = probe(place, text=place / "texts.jsonl", num_fit_tokens=1001, num_tokens=500, risk=0.3)
    assert (one.boundaries, one.classes) == (found.boundaries, found.classes)
    assert not one.is_prepared
    assert "--data PREFIX " in one.next_commands[-1]
    halves = probe(place, data=place / "short", fit_data=())
    assert halves.num_fit_tokens == pytest.approx(halves.num_tokens, abs=2 * LENGTH)


def test_risk_is_a_share_of_tokens(place: Path) -> None:
    """The last window is shorter than the others: its tokens must not count more."""
    found = probe(place, risk=0.3)
    assert found.num_tokens % LENGTH != 0
    num_wrong = found.best.disagreement * found.num_tokens
    assert 0 < num_wrong <= 0.3 * found.num_tokens
    assert num_wrong == pytest.approx(round(num_wrong), abs=1e-6)


def test_classes_cover_all_tokens(result: ProbeResult) -> None:
    assert sum(one.num_tokens for one in result.classes) == result.num_tokens
    for index, metrics in enumerate(result.boundaries):
        total = sum(one.agreement[index] * one.num_tokens for one in result.classes)
        assert total / result.num_tokens == pytest.approx(metrics.agreement)


def test_boundaries_can_be_chosen(place: Path, result: ProbeResult) -> None:
    found = probe(place, boundaries=(3, 1), num_exits=1)
    assert found.boundaries == (result.boundaries[0], result.boundaries[2])
    assert len(found.recommendations) == 1


def test_costs_are_measured(place: Path, result: ProbeResult) -> None:
    found = probe(place, costs="measured")
    assert found.layer_seconds is not None
    assert found.head_seconds is not None
    assert 0 < found.layer_seconds < 1
    assert found.head_cost == found.head_seconds / found.layer_seconds
    assert result.layer_seconds is None
    # The translator [h, h + 1], the norm [h] and the output weight, over a layer's weights.
    head, layer = 32 * 33 + 32 + 264 * 32, 2 * 32 + 64 * 32 + 32 * 32 + 3 * 48 * 32
    assert result.head_cost == pytest.approx(head / layer)
    config = TensorReader(place / "dense").config()
    assert weight_ratios(config) == pytest.approx((head / layer, (32 + 264 * 32) / layer))


def test_json_round_trip(result: ProbeResult) -> None:
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert ProbeResult.from_dict(record) == result
    assert record["next_commands"] == result.next_commands


def test_command_writes_files_and_names_the_next_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(place / "test"), "--fit-data", str(place / "fit")]
    files = ["--json", "probe.json", "--plot", "probe.svg"]
    options = [*data, "--seq-length", str(LENGTH), "--costs", "weights", "--risk", "0.3"]
    assert main(["probe", str(place / "dense"), *options, *files]) == 0
    result = ProbeResult.from_dict(json.loads((tmp_path / "probe.json").read_text()))
    assert capsys.readouterr().out == f"{result}\n\nwrote probe.json, probe.svg\n"
    words = "".join(ET.parse(tmp_path / "probe.svg").getroot().itertext())
    for expected in ("least-squares exit", "without least squares", "recommended exit", "number"):
        assert expected in words
    [command] = result.next_commands
    assert main(shlex.split(command)[1:]) == 0
    config = ee_llm.LLM(tmp_path / "runs" / "with-exits").config
    assert config.exits.boundaries == result.best.exits
    capsys.readouterr()
    assert main(["probe", str(place / "dense"), *options, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result.to_dict()
    assert captured.err == ""


def test_the_fit_must_not_use_the_text_of_the_test(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other names of the same data count too."""
    monkeypatch.chdir(place)
    with pytest.raises(RequestError, match="fit_data and data are both .*test: the exits would be"):
        probe(place, data="test", fit_data=place / "fit" / ".." / "test")


def test_small_risks_are_shown(place: Path) -> None:
    found = probe(place, risk=0.0004, boundaries=(3,))
    assert "best exits if at most 0.04% of the tokens may differ" in repr(found)
    assert "if at most 0.04% of the tokens may differ" in found.findings[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"data": (), "fit_data": ()}, "there is no text"),
    "one layer": ({"model": "single"}, "single has num_layers = 1: there is no boundary"),
    "boundary": ({"boundaries": (2, 4)}, "boundaries: 4 is out of range. Use 1 to 3"),
    "exits": ({"num_exits": 4}, "num_exits = 4 is out of range. Use 1 to 3"),
    "no exits": ({"num_exits": 0}, "num_exits = 0 is out of range"),
    "few tokens": ({"num_fit_tokens": 10}, "16 tokens are too few .* at least 33 are needed, and"),
    "no test": (
        {"fit_data": (), "num_fit_tokens": 10**6},
        r"the text has [\d,]+ tokens, and the least-squares fit takes all",
    ),
    "fit tokens": ({"num_fit_tokens": 0}, "num_fit_tokens = 0 is out of range"),
    "risk": ({"risk": 1.0}, "risk = 1.0 is not between 0 and 1"),
    "costs": ({"costs": "guessed"}, "costs = 'guessed' is unknown. Use one of measured, weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes(place: Path, case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises((RequestError, DataError), match=message):
        probe(place, **given)


def test_the_fit_needs_other_text_than_the_test(place: Path) -> None:
    with pytest.raises(RequestError, match=r"fit_data and data are both .*test: the exits would"):
        probe(place, fit_data=place / "test")


def test_a_launcher_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would do the same work otherwise."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="WORLD_SIZE = 2 .* a single process"):
        probe(place)
