"""What a generation looks like: pieces of text, colours, legend, table."""

import dataclasses
import io
from typing import get_args

import pytest
from rich.console import Console

from ee_llm.data.tokenizer import BytesTokenizer
from ee_llm.inference.generator import Generation
from ee_llm.inference.policy import make_policy
from ee_llm.inference.render import (
    colored_text,
    cut_pieces,
    legend,
    printable,
    token_pieces,
    token_table,
)
from ee_llm.inference.request import FinishReason
from ee_llm.inference.sampling import Sampling

PIECES = ["a", "[red]", "\x1b[2J", "é"]


def _generation() -> Generation:
    return Generation(
        prompt=(1, 2),
        tokens=(10, 11, 12, 13),
        exits=(2, 8, 2, 4),
        confidences=(0.9, 0.3, 0.85, 1.0),
        logprobs=(-0.1, -2.5, -0.2, 0.0),
        finish_reason="length",
        policy=make_policy((2, 4), [0.8, None]),
        sampling=Sampling(0.5, seed=3),
        strategy="exact",
    )


def _shown(renderable: object, color: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if color else None
    Console(file=file, force_terminal=color, color_system=system, width=100).print(renderable)
    return file.getvalue()


@pytest.mark.parametrize("text", ["plain", "naïve – 日本 🙂", "line\nline\n", "🙂"])
def test_pieces_join_to_the_text_and_characters_stay_whole(text: str) -> None:
    tokenizer = BytesTokenizer()
    prompt, tokens = tokenizer.encode("Ünï "), tokenizer.encode(text)
    pieces = token_pieces(tokenizer.decode, prompt, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert pieces == [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]


def test_pieces_of_broken_text_are_replacement_characters() -> None:
    tokenizer = BytesTokenizer()
    pieces = token_pieces(tokenizer.decode, [65], [0xE2, 66, 0xE2, tokenizer.eod])
    assert pieces == ["", "\N{REPLACEMENT CHARACTER}B", "", "\N{REPLACEMENT CHARACTER}"]
    assert token_pieces(tokenizer.decode, [65], [0xE2, 0x82]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_control_characters_can_not_drive_the_terminal() -> None:
    assert printable("a\x1b[2J\r\tb\n\x9b\x00") == "a\\x1b[2J\\r\tb\n\\x9b\\x00"
    shown = _shown(colored_text("prompt \x1b[31m", PIECES, _generation(), 8))
    table = _shown(token_table(PIECES, _generation(), 8))
    assert "\x1b" not in shown + table
    assert "prompt \\x1b[31ma[red]\\x1b[2Jé" in shown  # and brackets are no markup


def test_each_token_has_the_colour_of_its_exit() -> None:
    text = colored_text(">", PIECES, _generation(), 8)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["a"] == styles["\\x1b[2J"]
    assert len({styles[">"], styles["a"], styles["[red]"], styles["é"]}) == 4
    assert "\x1b[1;32ma" in _shown(text, color=True)
    assert "\x1b[1;32mexit 2" in _shown(legend(_generation(), 8), color=True)


def test_legend_counts_the_tokens_of_each_exit() -> None:
    lines = _shown(legend(_generation(), 8)).splitlines()
    assert lines[0].split() == ["exit", "2", "2", "tokens", "50%", "confidence", ">=", "0.8"]
    assert lines[1].split() == ["exit", "4", "1", "tokens", "25%", "off"]
    assert lines[2].split() == ["final", "exit", "1", "tokens", "25%"]
    assert lines[3] == "mean depth 4.00 of 8 layers, 4 tokens, finished by the number asked for"


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_legend_knows_every_finish_reason(reason: FinishReason) -> None:
    made = dataclasses.replace(_generation(), finish_reason=reason)
    assert "tokens, finished by " in _shown(legend(made, 8))


def test_table_has_a_row_for_each_token() -> None:
    header, *rows = _shown(token_table(PIECES, _generation(), 8)).splitlines()
    assert header.split() == ["#", "token", "id", "exit", "max_probability", "log", "p"]
    assert rows[1].split() == ["1", "'[red]'", "11", "8", "0.3000", "-2.5000"]
    assert len(rows) == 4


def test_pieces_end_where_the_text_does() -> None:
    assert cut_pieces(["ab", "", "cde", "f"], 4) == ["ab", "", "cd", ""]
    assert cut_pieces(["ab", "c"], 3) == ["ab", "c"]
    assert cut_pieces(["ab", "c"], 0) == ["", ""]
