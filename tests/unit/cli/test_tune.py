"""Test `ee-llm tune`: defaults from the checkpoint, help and errors."""

import re
import sys
import types
from pathlib import Path

import pytest

from ee_llm.checkpoint.read import CONFIG
from ee_llm.cli import main
from ee_llm.config import Config, load_config
from tests.unit.checkpoint.checkpoints import reseal, write_checkpoint

MODEL = {"model.shape": "llama-tiny", "model.num_layers": 4, "exits.boundaries": (1, 2)}


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Return the list of configurations that reach training, which does not run."""
    configs: list[Config] = []
    module = types.ModuleType("ee_llm.training.trainer")
    module.train = configs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ee_llm.training.trainer", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return configs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = write_checkpoint(tmp_path / "source")
    (path / CONFIG).write_text(load_config(None, MODEL).to_toml())
    reseal(path)
    return tmp_path / "source"


def test_checkpoint_describes_the_model(tmp_path: Path, source: Path, tuned: list[Config]) -> None:
    path = tmp_path / "tune.toml"
    path.write_text(f'[tuning]\ncheckpoint = "{source}"\n[data]\nprefixes = ["corpus"]\n')
    assert main.main(["tune", "--config", str(path), "--exits.boundaries", "1", "2", "3"]) == 0
    [config] = tuned
    assert config.model == load_config(None, MODEL).model
    assert config.exits.boundaries == config.tuning.exits == (1, 2, 3)


def test_data_options_default_to_those_of_the_checkpoint(source: Path, tuned: list[Config]) -> None:
    arguments = ["--tuning.checkpoint", str(source), "--data.prefixes", "corpus"]
    assert main.main(["tune", *arguments]) == 0
    assert main.main(["tune", *arguments, "--data.tokenizer", str(source)]) == 0
    assert main.main(["tune", *arguments, "--data.tokenizer", "x.json"]) == 0
    assert [config.data.tokenizer for config in tuned] == ["bytes", "bytes", "x.json"]
    assert {config.data.seq_length for config in tuned} == {256}


def test_data_can_be_prepared_with_the_tokenizer_of_a_run(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    options = ["--inputs", str(tmp_path / "a.txt"), "--tokenizer", str(source)]
    assert main.main(["data", "prepare", *options, "--output", str(tmp_path / "a")]) == 0
    assert "1 documents, 5 tokens" in capsys.readouterr().out


def test_options_hidden_from_help_can_be_given(
    source: Path, tuned: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tuning.checkpoint", str(source), "--data.prefixes", "corpus"]
    assert main.main(["tune", *arguments, "--model.dropout", "0.5"]) == 0
    assert tuned[0].model.dropout == 0.5
    assert main.main(["tune", *arguments, "--parallel.schedule", "zero-bubble"]) == 2
    assert "parallel.schedule = zero-bubble" in capsys.readouterr().err


def test_help_shows_required_options_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main.main(["tune", flag])
        texts.append(capsys.readouterr().out)
    for text in texts:
        required = text.partition("Required")[2].partition("\n\n")[0]
        assert re.findall(r"^  --(\S+)", required, re.MULTILINE) == [
            "data.prefixes",
            "tuning.checkpoint",
        ]
        assert text.index("--tuning.checkpoint") < text.index("--exits.boundaries")
        for name in (
            "model.num-layers",
            "parallel.virtual",
            "checkpoint.initial",
            "exits.curriculum",
        ):
            assert f"--{name}" not in text
    assert "--exits.placement" not in texts[0]
    assert "--exits.placement" in texts[1]


MISTAKES = {
    "no checkpoint": ([], "tuning.checkpoint: not given. Name a checkpoint"),
    "no such checkpoint": (
        ["--tuning.checkpoint", "nowhere"],
        "nowhere does not exist: expected a run directory or a checkpoint such as",
    ),
    "too few processes": (
        ["--tuning.checkpoint", "SOURCE", "--data.prefixes", "x", "--parallel.pipeline", "2"],
        "the number of processes, 1, is not a multiple of",
    ),
    "no data": (["--tuning.checkpoint", "SOURCE"], "data.prefixes = []"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_errors_are_one_line(
    case: str, source: Path, tuned: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = MISTAKES[case]
    arguments = [str(source) if argument == "SOURCE" else argument for argument in arguments]
    assert main.main(["tune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"ee-llm: {expected}")
    assert not tuned


def test_plan_of_tuning_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tune.toml"
    config = load_config(None, MODEL | {"tuning.checkpoint": "runs/a"})
    path.write_text(config.to_toml())
    assert main.main(["plan", "--config", str(path)]) == 2
    assert "tuning.checkpoint = runs/a: tuning has only one schedule" in (capsys.readouterr().err)
