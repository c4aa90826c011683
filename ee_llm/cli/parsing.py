"""Parsing of options, by the same rules for all commands.

- A path may begin with `~`, in every spelling: shells leave `--output=~/runs` as it is.
- Hyphens and underscores in names are equal: `--exits.initial-weights`, `--exits.initial_weights`.
- A list takes its values one after the other, by a repeated option, or both: `--exits 2 4` equals
  `--exits 2 --exits 4`. Lists of numbers and names also take commas: `--exits 2,4`. Texts and paths
  do not, because they may contain commas.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from ee_llm.errors import UserError


class _List(NamedTuple):
    """How a list option takes its values."""

    adds_up: bool
    """Whether a repeated option adds values; a list of fixed length takes the last one's."""
    takes_commas: bool


def parse(
    kind: Any, prog: str, arguments: Sequence[str], *, options: Any = None, **settings: Any
) -> Any:
    """Return the options in `arguments` as an instance of `kind`; exits with status 2 for bad ones.

    Raises UserError for an empty path.

    Args:
        kind: a dataclass, or a function whose parameters are the options.
        prog: the command as users type it, for help and errors.
        options: the dataclass or TypedDict that has the options where `kind` is a function.
        settings: passed on to `tyro.cli`.
    """
    _refuse_empty_paths(arguments, options or kind)
    lists = {f"--{_spelled(name)}": found for name, found in _lists(options or kind)}
    found = tyro.cli(kind, prog=prog, args=gather_lists(arguments, lists), **settings)
    return _with_home(found) if dataclasses.is_dataclass(found) else found


def _refuse_empty_paths(arguments: Sequence[str], kind: Any) -> None:
    """Raise UserError for an option with an empty path, which would be the working directory."""
    paths = {
        f"--{_spelled(name)}"
        for name, annotation in typing.get_type_hints(kind).items()
        if Path in (*_members(annotation), *typing.get_args(annotation))
    }
    name = ""
    for argument in arguments:
        value = argument
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            value = value if equals else name
        if not value and _spelled(name) in paths:
            raise UserError(
                f"{name} is given an empty path; name a file or folder, and check that a shell "
                "variable in the command is set"
            )


def gather_lists(arguments: Sequence[str], lists: Mapping[str, _List]) -> list[str]:
    """Return `arguments` with the values of each option of `lists` in one place."""
    groups: list[list[str]] = []
    by_name: dict[str, list[str]] = {}
    current: _List | None = None  # the list option whose values may follow
    values: list[str] = []
    for argument in arguments:
        if not argument.startswith("--"):
            if current is None:
                groups.append([argument])
            else:
                values += _values(argument, current)
            continue
        name, equals, value = argument.partition("=")
        current = lists.get(_spelled(name))
        if current is None:
            groups.append([argument])
            continue
        if _spelled(name) not in by_name or not current.adds_up:
            by_name[_spelled(name)] = [name]
            groups.append(by_name[_spelled(name)])
        values = by_name[_spelled(name)]
        if equals:
            values += _values(value, current)
    return [argument for group in groups for argument in _joined(group)]


def _joined(group: list[str]) -> list[str]:
    """Return an option and its values, joined by = if a single value looks like an option."""
    if len(group) == 2 and group[1].startswith("-"):
        return [f"{group[0]}={group[1]}"]
    return group


def _values(text: str, option: _List) -> list[str]:
    if not option.takes_commas:
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()] or [text]


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _with_home(options: Any) -> Any:
    """Return a dataclass with `~` replaced in its paths."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, tuple):
            changes[field.name] = tuple(map(_expanded, value))
        else:
            changes[field.name] = _expanded(value)
    return dataclasses.replace(options, **changes)


def _expanded(value: Any) -> Any:
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _lists(kind: Any, prefix: str = "") -> Iterator[tuple[str, _List]]:
    """Yield the dotted name of each list option; a TypedDict within another is a section."""
    for name, annotation in typing.get_type_hints(kind).items():
        if typing.is_typeddict(annotation) or dataclasses.is_dataclass(annotation):
            yield from _lists(annotation, f"{prefix}{name}.")
        for member in _members(annotation):
            if typing.get_origin(member) is tuple:
                items = typing.get_args(member)
                takes_commas = not {str, Path} & set(_members(items[0]))
                yield f"{prefix}{name}", _List(items[-1] is ..., takes_commas)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)
