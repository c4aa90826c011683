"""Print the help of a command: its common options with --help, all of them with --help-all."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ee_llm.cli.arguments.options import Option

_MAX_WIDTH = 100  # characters; longer lines are hard to read
_MAX_INDENT = 36  # characters before the text of an option


class Group(NamedTuple):
    """Related options. Names are separated by spaces."""

    title: str
    common: str
    """The options that --help shows."""
    advanced: str = ""
    """The options that only --help-all shows."""


class CommandHelp(NamedTuple):
    """The help of a command, except for the texts of its options."""

    command: str
    """The name of the command: "data prepare"."""
    description: str
    groups: Sequence[Group]
    examples: Sequence[str] = ()
    usage: str = ""
    """The words after the command; the required options and [OPTIONS] if empty."""
    required_title: str = "Required"
    """The title of the group of required options."""

    @property
    def prog(self) -> str:
        """Return the command as users type it."""
        return f"ee-llm {self.command}"


HELP_NAMES = ("-h", "--help", "--help-all", "--help_all")


def help_text(
    command: CommandHelp, options: Sequence[Option], *, is_full: bool, width: int | None = None
) -> str:
    """Return the help of a command, with all of its options if `is_full`."""
    if width is None:
        width = shutil.get_terminal_size((_MAX_WIDTH, 24)).columns
    width = max(40, min(width, _MAX_WIDTH))
    parts = [_usage(command, options), *_paragraphs(command.description, width)]
    groups = list(_grouped(command, options, is_full=is_full))
    names = [_name(option) for _, members in groups for option in members]
    indent = min(max(map(len, names), default=0) + 4, _MAX_INDENT, width // 2)
    for title, members in groups:
        entries = (_entry(option, indent, width, is_full=is_full) for option in members)
        parts.append("\n".join([title if title.endswith(".") else f"{title}:", *entries]))
    if command.examples:
        parts.append("\n".join(["Examples:", *(f"  {line}" for line in command.examples)]))
    if len(names) < len(options):
        parts.append(f"'{command.prog} --help-all' shows all {len(options)} options.")
    return "\n\n".join(parts)


def _usage(command: CommandHelp, options: Sequence[Option]) -> str:
    words = [f"usage: {command.prog}"]
    if command.usage:
        return " ".join([*words, command.usage])
    for option in options:
        if option.is_positional:
            words.append(_positional(option) if option.is_required else f"[{_positional(option)}]")
    words += [
        f"--{option.spelling} {option.metavar}"
        for option in options
        if option.is_required and not option.is_positional
    ]
    return " ".join([*words, "[OPTIONS]"])


def _positional(option: Option) -> str:
    name = option.name.upper()
    return f"{name} ..." if option.list_type is not None else name


def _grouped(
    command: CommandHelp, options: Sequence[Option], *, is_full: bool
) -> Iterator[tuple[str, list[Option]]]:
    """Yield the title and options of each group with options to show: required ones first."""
    remaining = {option.name: option for option in options}
    required = [name for name, option in remaining.items() if option.is_required]
    yield from _nonempty(command.required_title, [remaining.pop(name) for name in required])
    for group in command.groups:
        common = [remaining.pop(name) for name in group.common.split() if name in remaining]
        advanced = [remaining.pop(name) for name in group.advanced.split() if name in remaining]
        yield from _nonempty(group.title, common + advanced if is_full else common)
    yield from _nonempty("Other", list(remaining.values()) if is_full else [])


def _nonempty(title: str, options: list[Option]) -> Iterator[tuple[str, list[Option]]]:
    if options:
        yield title, options


def _name(option: Option) -> str:
    if option.is_positional:
        return _positional(option)
    if not option.is_flag:
        return f"--{option.spelling} {option.metavar}"
    if option.default is None:
        return f"--{option.spelling}"
    section, dot, leaf = option.spelling.rpartition(".")
    return f"--{section}{dot}[no-]{leaf}"


def _entry(option: Option, indent: int, width: int, *, is_full: bool) -> str:
    text = option.text if is_full else _first_sentence(option.text)
    if option.default is not None:
        text = f"{text} (default: {option.default})"
    blanks = " " * indent
    lines = textwrap.wrap(
        text, width, initial_indent=blanks, subsequent_indent=blanks, break_on_hyphens=False
    )
    name = f"  {_name(option)}"
    if len(name) + 2 > indent or not lines:
        return "\n".join([name, *lines])
    return "\n".join([name.ljust(indent) + lines[0][indent:], *lines[1:]])


def _first_sentence(text: str) -> str:
    """Return the first sentence of an option's text, and the default that ends the text."""
    default = re.search(r" \(default: [^()]*(\([^()]*\)[^()]*)*\)$", text)
    body = text[: default.start()] if default else text
    return re.split(r"(?<=[.])\s", body, maxsplit=1)[0] + (default[0] if default else "")


def _paragraphs(text: str, width: int) -> list[str]:
    return [
        textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False)
        for paragraph in re.split(r"\n\s*\n", text.strip())
    ]
