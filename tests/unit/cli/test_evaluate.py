"""`ee-llm evaluate`: its table, its files, and its errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ee_llm
from ee_llm.cli import main
from tests.unit.evaluation.models import TOKENS, make_config, save, write_data, write_texts

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and texts."""
    path = tmp_path_factory.mktemp("place")
    save(path / "run", make_config())
    write_data(path / "data")
    write_texts(path / "texts")
    return path


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def run(*arguments: object, status: int = 0) -> None:
    assert main.main(["evaluate", *map(str, arguments)]) == status


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, picture = tmp_path / "result.json", tmp_path / "exits.svg"
    run("run", "--text", "texts", "--dtype", "float32", "--json", record, "--plot", picture)
    out = capsys.readouterr().out
    result = ee_llm.evaluate("run", text="texts", dtype="float32", progress=False)
    assert out == f"{result}\n\nwrote {record}, {picture}\n"
    assert json.loads(record.read_text()) == result.to_dict()
    assert "layer 4 (final)" in out
    assert picture.read_text().lstrip().startswith("<?xml")


def test_json_on_standard_output_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    run("run", "--data", "data", "--json", "-", "--num-tokens", 50, "--seq-length", 8)
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["num_tokens"], record["seq_length"]) == (50, 8)
    assert record["inputs"] == ["data"]
    assert captured.err == ""


def test_several_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", [[1, 2, 3]])
    run("run", "--data", "data", other, "--json=-")
    assert json.loads(capsys.readouterr().out)["num_tokens"] == len(TOKENS) - 1 + 2


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no text": ((), "data (--data)"),
    "both": (("--data", "data", "--text", "texts"), "data = data and text = texts"),
    "picture": (("--data", "data", "--plot", "a.jpg"), "plot = a.jpg is not a picture"),
    "no folder": (("--data", "data", "--json", "no/a.json"), "--json no/a.json: the folder no"),
    "folder": (("--data", "data", "--plot", "texts/a.svg/b.svg"), "--plot texts/a.svg/b.svg"),
    "ranks": (("--data", "data", "--tensor", "3"), "tensor = 3 does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, expected = REFUSED[case]
    run("run", *options, status=2)
    captured = capsys.readouterr()
    assert expected in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_ranks_of_a_launcher_must_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two ranks would evaluate on its own otherwise."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run("run", "--data", "data", status=2)
    said = "tensor = 1 x pipeline = 1 does not fit WORLD_SIZE = 2"
    assert said in capsys.readouterr().err
    with pytest.raises(ee_llm.errors.UserError, match=said):
        ee_llm.evaluate("run", data="data")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from ee_llm.cli import main\n"
        "try: main.main(['evaluate', '--help'])\n"
        "except SystemExit as done: print('torch' in sys.modules, done.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0"
