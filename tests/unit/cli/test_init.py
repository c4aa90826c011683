"""Test `ee-llm init`: the file that it writes, and its errors."""

import re
from pathlib import Path

import pytest

from ee_llm.cli import main
from ee_llm.config import SHAPES, load_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shape", SHAPES)
def test_file_loads_and_can_be_planned(
    shape: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["init", "run.toml", "--shape", shape]) == 0
    assert "wrote run.toml" in capsys.readouterr().out
    config = load_config("run.toml")
    assert config.model.shape == shape
    num_layers = config.model.num_layers
    assert config.exits.boundaries == (num_layers // 4, num_layers // 2)
    assert main.main(["plan", "--config", "run.toml"]) == 0
    assert "2 ranks" in capsys.readouterr().out


def test_options_have_comments_and_show_their_defaults(folder: Path) -> None:
    assert main.main(["init"]) == 0
    text = Path("train.toml").read_text()
    before = load_config("train.toml")
    lines = text.splitlines()
    options = [number for number, line in enumerate(lines) if re.match(r"(# )?\w+ = ", line)]
    assert len(options) > 20
    assert all(lines[number - 1].startswith("# ") for number in options)
    assert max(map(len, lines)) <= 100
    Path("all.toml").write_text(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    assert load_config("all.toml") == before


@pytest.mark.parametrize(
    ("arguments", "boundaries"),
    [(["--exits", "1,2,3"], (1, 2, 3)), (["--exits", "6"], (6,)), (["--exits"], ())],
)
def test_exits_option(arguments: list[str], boundaries: tuple[int, ...], folder: Path) -> None:
    assert main.main(["init", *arguments]) == 0
    assert load_config("train.toml").exits.boundaries == boundaries


def test_existing_file_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "train.toml"
    path.write_text("existing")
    assert main.main(["init"]) == 2
    assert "train.toml already exists" in capsys.readouterr().err
    assert path.read_text() == "existing"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none/a.toml"], "none/a.toml: the folder none does not exist"),
        (["--shape", "llama-9B"], "model.shape = 'llama-9B'"),
        (["--exits", "8"], "exits.boundaries = [8]"),
    ],
)
def test_errors_leave_no_file(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["init", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert list(folder.iterdir()) == []
