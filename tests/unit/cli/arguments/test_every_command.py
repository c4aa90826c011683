"""Test that every option of every command follows the same rules of spelling."""

import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from ee_llm.cli import main, run_options
from ee_llm.cli.arguments import parsing
from ee_llm.cli.arguments.help import CommandHelp
from ee_llm.cli.arguments.options import Option, members

SAMPLES: dict[Any, str] = {int: "3", float: "0.5", str: "a", Path: "b/c"}


class ParsedError(Exception):
    """Ends a command when it parses its options, which it carries."""

    def __init__(self, options: Sequence[Option], command: CommandHelp) -> None:
        super().__init__(command.command)
        self.options, self.command = options, command


def options_of(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Sequence[Option], CommandHelp]:
    def parse_values(options: Sequence[Option], command: CommandHelp, *_: Any) -> None:
        raise ParsedError(options, command)

    with monkeypatch.context() as patch:
        patch.setattr(parsing, "parse_values", parse_values)
        patch.setattr(run_options, "parse_values", parse_values)
        with pytest.raises(ParsedError) as parsed:
            main.main(command.split())
    return parsed.value.options, parsed.value.command


def sample(annotation: Any) -> str:
    """Return the text of a value of the type."""
    for member in members(annotation):
        if typing.get_origin(member) is Literal:
            return str(typing.get_args(member)[0])
        if member in SAMPLES:
            return SAMPLES[member]
    raise AssertionError(annotation)


def samples(option: Option) -> list[str]:
    """Return the texts of the values of a list option."""
    items = typing.get_args(option.list_type)
    return [sample(items[0])] * (2 if items[-1] is ... else len(items))


def takes_commas(option: Option) -> bool:
    return not {str, Path} & set(members(typing.get_args(option.list_type)[0]))


def with_hyphens(option: Option) -> list[str]:
    name = f"--{option.name.replace('_', '-')}"
    if option.is_flag:
        return [name]
    if option.list_type is not None:
        return [name, *samples(option)]
    return [name, sample(option.annotation)]


def with_underscores(option: Option) -> list[str]:
    name = f"--{option.name.replace('-', '_')}"
    if option.is_flag:
        return [f"{name}=true"]
    if option.list_type is None:
        return [f"{name}={sample(option.annotation)}"]
    if takes_commas(option):
        return [f"{name}={','.join(samples(option))}"]
    return [f"{name}={value}" for value in samples(option)]


@pytest.mark.parametrize("command", main.COMMANDS)
def test_spellings(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyphens and underscores, blanks and commas, `--x` and `--x=true` are equal."""
    options, help_ = options_of(command, monkeypatch)
    positional = [
        value
        for option in options
        if option.is_positional
        for value in (samples(option) if option.list_type else [sample(option.annotation)])
    ]
    named = [option for option in options if not option.is_positional]
    found = []
    for spell in (with_hyphens, with_underscores):
        words = [word for option in named for word in spell(option)]
        found.append(parsing.parse_values(options, help_, [*positional, *words]))
    assert found[0] == found[1]
    assert found[0].keys() == {option.name for option in options}
    for option in named:
        if option.is_flag:
            assert found[0][option.name] is True
        if option.list_type is not None:
            assert len(found[0][option.name]) == len(samples(option))


@pytest.mark.parametrize("command", main.COMMANDS)
def test_negated_and_unset_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, help_ = options_of(command, monkeypatch)
    options = [option._replace(is_required=False) for option in options]
    flags = [option for option in options if option.is_flag]
    unset = [option for option in options if type(None) in members(option.annotation)]
    expected: dict[str, Any] = dict.fromkeys((option.name for option in flags), False)
    expected |= dict.fromkeys((option.name for option in unset), None)
    for separator in "-_":
        words = []
        for option in flags:
            section, dot, leaf = option.name.replace("_", separator).rpartition(".")
            words.append(f"--{section}{dot}no{separator}{leaf}")
        for option in unset:
            words += [f"--{option.name.replace('_', separator)}", "None"]
        assert parsing.parse_values(options, help_, words) == expected


@pytest.mark.parametrize(
    "arguments", [["convert", "", "--output", "a"], ["convert", "a", "--output="], ["init", ""]]
)
def test_empty_paths(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A path from an unset variable of the shell must not mean the working directory."""
    assert main.main(arguments) == 2
    assert "empty path" in capsys.readouterr().err
