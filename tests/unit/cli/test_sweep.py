"""`ee-llm sweep` and `ee-llm report`: their files, and their errors."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ee_llm.cli import main
from ee_llm.errors import UserError
from ee_llm.evaluation.sweep.result import SweepResult
from ee_llm.output_files import check_writable
from tests.unit.evaluation.sweep.places import make_place

pytestmark = pytest.mark.thorough

FAST = ("--max-tokens", "4", "--rounds", "1", "--thresholds", "0.15", "--draft-lengths", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def run(*arguments: object, status: int = 0) -> None:
    assert main.main([*map(str, arguments)]) == status


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.png")]
    outputs = ["--json", files[0], "--csv", files[1], "--plot", files[2]]
    run("sweep", "run", "--prompts", "prompts.jsonl", "--exits", "2+4", 4, *FAST, *outputs)
    result = SweepResult.from_dict(json.loads(files[0].read_text()))
    names = [
        "full",
        "exits 2+4 at 0.15",
        "exit 4 at 0.15",
        "draft 2 at exit 2",
        "draft 2 at exit 4",
    ]
    assert [point.name for point in result.points] == names
    assert capsys.readouterr().out == f"{result}\n\nwrote {', '.join(map(str, files))}\n"
    assert len(list(csv.reader(files[1].read_text().splitlines()))) == 6
    assert files[2].read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "report.html"
    run(
        "report", "run", "--text", "texts", "--sweep", files[0], "--output", page, "--max-tokens", 4
    )
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert result.command() in page.read_text()


def test_json_on_standard_output_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep", "run", "--prompts", "prompts.jsonl", *FAST, "--num-prompts", 2, "--json", "-")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_prompts"] == 2
    assert captured.err == ""


PROMPTS = ("--prompts", "prompts.jsonl")
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no prompts": (
        ("sweep", "run"),
        "there are no prompts. Give one of these: prompts (--prompts)",
    ),
    "no exit": (("sweep", "run", *PROMPTS, "--exits", "3"), "exits: 3 is not an exit"),
    "no exits": (("sweep", "dense", *PROMPTS), "dense has no early exits to measure"),
    "threshold": (("sweep", "run", *PROMPTS, "--thresholds", "0"), "thresholds = 0.0 is not in"),
    "picture": (("sweep", "run", *PROMPTS, "--plot", "a.jpg"), "plot = a.jpg is not a picture"),
    "no folder": (("sweep", "run", *PROMPTS, "--csv", "no/a.csv"), "--csv no/a.csv: the folder no"),
    "folder": (("report", "run", "--text", "texts", "--output", "texts"), "texts is a folder"),
    "no text": (("report", "run"), "there is no text to evaluate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = REFUSED[case]
    run(*words, status=2)
    captured = capsys.readouterr()
    assert expected in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_figures_are_kept_if_the_picture_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SweepResult, path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(SweepResult, "save_plot", fail)
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.png")]
    outputs = ["--json", files[0], "--csv", files[1], "--plot", files[2]]
    words = [*PROMPTS, "--num-prompts", 1, *FAST, "--families", "self-speculative", *outputs]
    assert main.main([str(word) for word in ("sweep", "run", *words)]) != 0
    assert SweepResult.from_dict(json.loads(files[0].read_text())).num_prompts == 1
    assert files[1].exists()


def test_standard_output_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """- is not a file in the folder."""
    (tmp_path / "-").mkdir()
    monkeypatch.chdir(tmp_path)
    check_writable("--json", Path("-"))
    with pytest.raises(UserError, match="--csv - is a folder"):
        check_writable("--csv", Path("-"))


@pytest.mark.parametrize("command", ["sweep", "report"])
def test_help_does_not_import_torch(command: str) -> None:
    code = (
        "import sys; from ee_llm.cli import main\n"
        f"try: main.main(['{command}', '--help'])\n"
        "except SystemExit as done: print('torch' in sys.modules, done.code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False 0"
