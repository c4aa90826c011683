"""Test the rules for options that all commands share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse, parse_values
from ee_llm.cli.run_options import config_options
from ee_llm.cli.train import COMMAND as TRAIN
from ee_llm.config import HeadPart

COMMAND = CommandHelp("test", "Test.", (Group("Options", "exits json"),))


@dataclass(frozen=True)
class Options:
    """Options of every kind that commands have."""

    paths: tuple[Path, ...] = ()
    exits: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] = ()
    exit_head: tuple[HeadPart, ...] = ()
    stop: tuple[str, ...] = ()
    output: Path | None = None
    json: bool = False
    progress: bool = True
    top_k: int | None = 5


def parsed(*arguments: str) -> Options:
    options = parse(Options, COMMAND, arguments)
    assert isinstance(options, Options)
    return options


@pytest.mark.parametrize(
    "arguments",
    [
        "--exits 2 4 6",
        "--exits 2,4,6",
        "--exits=2,4,6",
        "--exits=2 4 6",
        "--exits 2, 4, 6",
        "--exits 2 --exits 4 --exits 6",
        "--exits 2 --json --exits 4,6",
        "--exits=2 --exits=4 6",
    ],
)
def test_list_in_every_spelling(arguments: str) -> None:
    """tyro itself keeps the last of repeated options silently, and does not split at commas."""
    assert parsed(*arguments.split()).exits == (2, 4, 6)


def test_names_accept_hyphens_and_underscores() -> None:
    expected = parsed("--exit-head", "mlp", "norm")
    assert expected.exit_head == ("mlp", "norm")
    assert parsed("--exit_head", "mlp", "--exit-head", "norm") == expected
    assert parsed("--exit_head=mlp,norm") == expected


@pytest.mark.parametrize("text", ["--x", "---", "-x", "--json", "-"])
def test_text_may_look_like_an_option(text: str) -> None:
    assert parsed(f"--stop={text}", "--exits", "2").stop == (text,)


def test_texts_and_paths_may_contain_commas() -> None:
    options = parsed("--stop", "a,b", "--stop", "c", "--paths", "one, two/x")
    assert options.stop == ("a,b", "c")
    assert options.paths == (Path("one, two/x"),)


def test_negative_numbers_are_values() -> None:
    assert parsed("--thresholds", "-1", "-0.5,2").thresholds == (-1.0, -0.5, 2.0)


@pytest.mark.parametrize("arguments", ["--json", "--json true", "--json=True", "--no-json false"])
def test_true_in_every_spelling(arguments: str) -> None:
    assert parsed(*arguments.split(), "--exits", "2").json is True


@pytest.mark.parametrize(
    "arguments", ["--no-progress", "--no_progress", "--progress false", "--progress=FALSE"]
)
def test_false_in_every_spelling(arguments: str) -> None:
    assert parsed(*arguments.split(), "--exits", "2").progress is False


def test_negation_before_or_after_the_section() -> None:
    for name in ("exits.no-deferred", "exits.no_deferred", "no-exits.deferred"):
        assert parse_values(config_options(), TRAIN, [f"--{name}"]) == {"exits.deferred": False}


def test_other_values_of_a_boolean_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parsed("--json=maybe")
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert "--json" in error
    assert "maybe" in error


def test_none_unsets_an_option() -> None:
    assert parsed().top_k == 5
    assert parsed("--top-k", "None").top_k is None
    assert parsed("--top_k=3").top_k == 3
    given = parse_values(config_options(), TRAIN, ["--optimizer.decay_steps", "None"])
    assert given == {"optimizer.decay_steps": None}


def test_an_empty_list_differs_from_none() -> None:
    assert parsed("--exits").exits == ()
    assert parsed().exits is None


@pytest.mark.parametrize("value", ["2;4", ",", "2,x", ""])
def test_values_that_are_not_numbers_are_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        parsed("--exits", value)
    assert done.value.code == 2
    assert "--exits" in capsys.readouterr().err


def test_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output=~/runs` must not create a folder named ~ in the working directory."""
    monkeypatch.setenv("HOME", "/home/me")
    options = parsed("--output=~/runs", "--paths", "~/a", "b~")
    assert options.output == Path("/home/me/runs")
    assert options.paths == (Path("/home/me/a"), Path("b~"))


@pytest.mark.parametrize(
    "arguments", [["--output", ""], ["--output="], ["--paths", "a", ""], ["--json", "--paths="]]
)
def test_empty_path_is_refused(arguments: list[str]) -> None:
    """`--inputs "$TEXTS"` with an unset variable would read the working directory."""
    with pytest.raises(ValueError, match=r"--(output|paths) has an empty path"):
        parsed(*arguments)
    assert parsed("--stop", "", "--paths", "a").stop == ("",)


def test_options_in_sections() -> None:
    def given(*arguments: str) -> dict[str, Any]:
        return parse_values(config_options(), TRAIN, arguments)

    assert given(
        "--exits.boundaries", "2", "--exits.initial-weights=0,0.5", "--exits.boundaries=4"
    ) == {"exits.boundaries": (2, 4), "exits.initial_weights": (0.0, 0.5)}
    # A list of fixed length is replaced when it is repeated, like a single value.
    split = ("--data.split", "0.9,0.1,0", "--data.split", "0.8", "0.1", "0.1")
    assert given(*split) == {"data.split": (0.8, 0.1, 0.1)}
    assert given("--data.prefixes", "a,b", "c") == {"data.prefixes": ("a,b", "c")}
