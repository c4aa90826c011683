"""Describe the options of a command: their names, types, texts and defaults."""

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

_NAMES: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


class Option(NamedTuple):
    """An option of a command."""

    name: str
    """The name of the field, with its section if it has one: exits.initial_weights."""
    annotation: Any
    """The type of its value."""
    text: str
    """The help text. It may end with the default, as in "(default: one per core)"."""
    default: str | None = None
    """The default as help shows it; None if there is none to show or `text` contains it."""
    is_required: bool = False
    is_positional: bool = False

    @property
    def spelling(self) -> str:
        """Return the name as help shows it: exits.initial-weights."""
        return spelled(self.name)

    @property
    def is_flag(self) -> bool:
        """Return whether the option is a Boolean."""
        return self.annotation is bool

    @property
    def list_type(self) -> Any:
        """Return the tuple type of an option that takes several values, else None."""
        found = (kind for kind in members(self.annotation) if typing.get_origin(kind) is tuple)
        return next(found, None)

    @property
    def metavar(self) -> str:
        """Return the placeholder of the value as help shows it, such as INT ..."""
        if self.list_type is None:
            return _metavar(self.annotation)
        items = typing.get_args(self.list_type)
        item = _metavar(items[0])
        return f"{item} ..." if items[-1] is ... else " ".join([item] * len(items))


def spelled(name: str) -> str:
    """Return an option's name with hyphens, which are equal to underscores."""
    return name.replace("_", "-")


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or a tuple of the annotation itself."""
    if typing.get_origin(annotation) is Annotated:
        return members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(itertools.chain(*map(members, typing.get_args(annotation))))
    return (annotation,)


def options_of(kind: type, positional: Sequence[str] = ()) -> list[Option]:
    """Return the options that a dataclass declares, in the order of its fields.

    The string below a field is its help text.
    """
    hints, texts = typing.get_type_hints(kind), dict(_texts(kind))
    return [
        Option(
            field.name,
            hints[field.name],
            texts.get(field.name, ""),
            None if "(default: " in texts.get(field.name, "") else shown(field.default),
            field.default is dataclasses.MISSING,
            field.name in positional,
        )
        for field in dataclasses.fields(kind)
    ]


def shown(value: Any) -> str | None:
    """Return a default as help shows it, or None for one that is not informative."""
    if value is dataclasses.MISSING or value is None or value is False or value == ():
        return None
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def _texts(kind: type) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each documented field, those of base classes first."""
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                yield statement.target.id, " ".join(str(following.value.value).split())


def _metavar(annotation: Any) -> str:
    names = []
    for member in members(annotation):
        if typing.get_origin(member) is Literal:
            names += [str(value) for value in typing.get_args(member)]
        elif member is not type(None):
            names.append(_NAMES.get(member, "VALUE"))
    return "|".join(names)
