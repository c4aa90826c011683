"""Parse options by the same rules for all commands.

- Hyphens and underscores in names are equal: `--exits.initial-weights`, `--exits.initial_weights`.
- A list takes its values one after the other, by a repeated option, or both: `--exits 2 4` equals
  `--exits 2 --exits 4`. Lists of numbers and names also take commas: `--exits 2,4`. Texts and paths
  do not, because they may contain commas.
- A Boolean takes no value, or true or false: `--json`, `--no-json`, `--json false`, `--json=false`.
- An optional value can be unset with None: `--optimizer.decay-steps None`.
- A path may begin with `~`, including in `--output=~/runs`, which shells do not expand.
- `-h` and `--help` print the common options, `--help-all` all of them.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict, TypeVar, cast

from ee_llm.cli.arguments.help import HELP_NAMES, CommandHelp, help_text
from ee_llm.cli.arguments.options import Option, members, options_of, spelled
from ee_llm.errors import UserError

_Kind = TypeVar("_Kind")


def parse(
    kind: type[_Kind],
    command: CommandHelp,
    arguments: Sequence[str],
    positional: Sequence[str] = (),
) -> _Kind:
    """Return the options in `arguments` as an instance of the dataclass `kind`.

    Raises:
        SystemExit: With status 0 after printing help, and with status 2 for options that do not
            exist, are missing, or have values of another type.
        UserError: A path is empty.
    """
    return kind(**parse_values(options_of(kind, positional), command, arguments))


def narrowed(options: Any, kind: type[_Kind]) -> _Kind:
    """Return the part of a command's options that a function of the Python API takes.

    Args:
        options: Options of a command, whose class extends `kind`.
        kind: The dataclass to return.
    """
    return kind(**{field.name: getattr(options, field.name) for field in fields(cast(Any, kind))})


def parse_values(
    options: Sequence[Option],
    command: CommandHelp,
    arguments: Sequence[str],
    help_options: Sequence[Option] | None = None,
) -> dict[str, Any]:
    """Return the values of the given options, by name. Raises as `parse` does.

    Args:
        options: The options that the command accepts.
        command: The help of the command.
        arguments: The words on the command line after the command's name.
        help_options: The options that help shows, if these are not all.
    """
    if requested := [argument for argument in arguments if argument in HELP_NAMES]:
        is_full = any(spelled(argument) == "--help-all" for argument in requested)
        shown = options if help_options is None else help_options
        print(help_text(command, shown, is_full=is_full))
        sys.exit(0)
    by_spelling = {option.spelling: option for option in options}
    words = list(normalized(arguments, by_spelling))
    _refuse_empty_paths(words, by_spelling)
    import tyro  # slow, and not needed for help

    fields = {option.name: _annotated(option) for option in options}
    # A TypedDict without required keys, so that tyro returns the given values and nothing else.
    kind: Any = TypedDict("Options", fields, total=False)  # type: ignore[misc]
    values: Any = tyro.cli(kind, prog=command.prog, args=words)
    return {name: _with_home(value) for name, value in values.items()}


def _annotated(option: Option) -> Any:
    """Return the type that tyro parses an option by."""
    import tyro

    hint = "(required)" if option.is_required else ""
    if option.default is not None:
        hint = f"(default: {option.default})"
    argument = tyro.conf.arg(help=option.text, help_behavior_hint=hint)
    markers = [argument, tyro.conf.FlagConversionOff]
    if option.is_positional:
        markers.append(tyro.conf.Positional)
    kind: Any = Annotated[(option.annotation, *markers)]
    return Required[kind] if option.is_required else kind


def normalized(arguments: Sequence[str], options: Mapping[str, Option]) -> Iterator[str]:
    """Yield `arguments` in one spelling: the values of a list in one place, flags with a value."""
    groups: list[list[str]] = []
    by_name: dict[str, list[str]] = {}
    current: Option | None = None  # the list option whose values may follow
    remaining = list(reversed(arguments))
    while remaining:
        argument = remaining.pop()
        name, equals, value = argument.partition("=")
        option = options.get(spelled(name[2:])) if argument.startswith("--") else None
        if not argument.startswith("--"):
            if current is None:
                groups.append([argument])
            else:
                by_name[current.name] += _values(argument, current)
        elif option is not None and option.list_type is not None:
            current = option
            if option.name not in by_name or not _adds_up(option):
                by_name[option.name] = [f"--{option.spelling}"]
                groups.append(by_name[option.name])
            if equals:
                by_name[option.name] += _values(value, option)
        else:
            current = None
            flag, is_on = _flag(spelled(name[2:]), options)
            if flag is None:
                groups.append([argument])
                continue
            if not equals:
                is_value = bool(remaining) and remaining[-1].lower() in ("true", "false")
                value = remaining.pop() if is_value else "true"
            groups.append([f"--{flag.spelling}", _truth(value, is_on)])
    for group in groups:
        yield from _joined(group)


def _flag(name: str, options: Mapping[str, Option]) -> tuple[Option | None, bool]:
    """Return the Boolean option of a name, None if there is none, and whether it turns it on."""
    section, dot, leaf = name.rpartition(".")
    names = {name: True, f"{section}{dot}{leaf.removeprefix('no-')}": not leaf.startswith("no-")}
    names.setdefault(name.removeprefix("no-"), False)
    for found, is_on in names.items():
        if found in options and options[found].is_flag:
            return options[found], is_on
    return None, True


def _truth(value: str, is_on: bool) -> str:
    """Return the value of a Boolean as tyro spells it. Other values are left for tyro to refuse."""
    if value.lower() not in ("true", "false"):
        return value
    return str((value.lower() == "true") == is_on)


def _adds_up(option: Option) -> bool:
    """Return whether a repeated option adds values; a list of fixed length takes the last ones."""
    return bool(option.list_type.__args__[-1] is ...)


def _joined(group: list[str]) -> list[str]:
    """Return an option and its values, joined by = if a single value looks like an option."""
    if len(group) == 2 and group[1].startswith("-"):
        return [f"{group[0]}={group[1]}"]
    return group


def _values(text: str, option: Option) -> list[str]:
    if {str, Path} & set(members(option.list_type.__args__[0])):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()] or [text]


def _refuse_empty_paths(arguments: Sequence[str], options: Mapping[str, Option]) -> None:
    """Raise UserError for an option with an empty path, which would be the working directory."""
    name = ""
    positional = next((option for option in options.values() if option.is_positional), None)
    for argument in arguments:
        value = argument
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            value = value if equals else name
        option = options.get(spelled(name[2:])) if name else positional
        if not value and option is not None and _takes_paths(option):
            raise UserError(
                f"{name or option.name.upper()} has an empty path. Give a file or folder, and "
                "check that a shell variable in the command is set."
            )


def _takes_paths(option: Option) -> bool:
    items = () if option.list_type is None else option.list_type.__args__
    return Path in (*members(option.annotation), *items)


def _with_home(value: Any) -> Any:
    """Return a value with `~` replaced in its paths."""
    if isinstance(value, tuple):
        return tuple(map(_with_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value
