"""Test the content, order and layout of help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ee_llm.cli import main
from ee_llm.cli.arguments.help import CommandHelp, Group, help_text
from ee_llm.cli.arguments.options import options_of


@dataclass(frozen=True)
class Base:
    """Options that a class inherits."""

    output: Path
    """Where the result goes."""


@dataclass(frozen=True)
class Options(Base):
    """Options of several kinds."""

    file: Path = Path("a.txt")
    """File to read."""

    top_k: int | None = None
    """Number of tokens. The rest of the text is for the full help. (default: all of them)"""

    kinds: tuple[Literal["one", "two"], ...] = ("one", "two")
    """Kinds to use."""

    progress: bool = True
    """Show progress."""

    json: bool = False
    """Print JSON."""

    seed: int = 0
    """Seed of the draws."""


COMMAND = CommandHelp(
    "read",
    "Read a file.\n\n    In two paragraphs.",
    (Group("Input", "file kinds", "top_k"), Group("Report", "", "progress json")),
    ("ee-llm read a.txt --output b",),
)


def shown(*, is_full: bool) -> str:
    options = options_of(Options, positional=("file",))
    return help_text(COMMAND, options, is_full=is_full, width=80)


def test_short_help() -> None:
    assert shown(is_full=False) == (
        "usage: ee-llm read [FILE] --output PATH [OPTIONS]\n"
        "\n"
        "Read a file.\n"
        "\n"
        "In two paragraphs.\n"
        "\n"
        "Required:\n"
        "  --output PATH        Where the result goes.\n"
        "\n"
        "Input:\n"
        "  FILE                 File to read. (default: a.txt)\n"
        "  --kinds one|two ...  Kinds to use. (default: one two)\n"
        "\n"
        "Examples:\n"
        "  ee-llm read a.txt --output b\n"
        "\n"
        "'ee-llm read --help-all' shows all 7 options."
    )


def test_full_help_has_all_options_in_their_groups() -> None:
    text = shown(is_full=True)
    assert text.partition("Input:\n")[2] == (
        "  FILE                 File to read. (default: a.txt)\n"
        "  --kinds one|two ...  Kinds to use. (default: one two)\n"
        "  --top-k INT          Number of tokens. The rest of the text is for the full\n"
        "                       help. (default: all of them)\n"
        "\n"
        "Report:\n"
        "  --[no-]progress      Show progress. (default: on)\n"
        "  --json               Print JSON.\n"
        "\n"
        "Other:\n"
        "  --seed INT           Seed of the draws. (default: 0)\n"
        "\n"
        "Examples:\n"
        "  ee-llm read a.txt --output b"
    )


def test_the_first_sentence_keeps_the_default() -> None:
    command = COMMAND._replace(groups=(Group("Input", "top_k"),))
    text = help_text(command, options_of(Options), is_full=False, width=80)
    assert "  --top-k INT    Number of tokens. (default: all of them)\n" in text


def displayed(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        main.main([*command.split(), "--unknown", flag])
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_of_every_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms begin with the usage and have examples; the short form is short."""
    monkeypatch.setenv("COLUMNS", "100")
    short = displayed(command, "--help", capsys)
    full = displayed(command, "--help-all", capsys)
    assert displayed(command, "-h", capsys) == short
    assert displayed(command, "--help_all", capsys) == full
    for text in (short, full):
        assert text.startswith(f"usage: ee-llm {command} ")
        assert f"\n  ee-llm {command}" in text.partition("Examples:")[2]
        assert text.index("usage:") < text.index("[OPTIONS]") < text.index("Examples:")
    assert short.count("\n") <= 90
    assert "\nOther:\n" not in full, "an option is in no group"
