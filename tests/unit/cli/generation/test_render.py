"""Test the display of a generation: text, colours, legend and table."""

import dataclasses
import io
from typing import get_args

import pytest
from rich.console import Console

from ee_llm.cli.generation.render import exit_styles, legend, printable, token_table
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import FinishReason
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.speed import Speed

PIECES = ("a", "[red]", "\x1b[2J", "é")


def _output() -> RequestOutput:
    return RequestOutput(
        request_id="a",
        prompt_token_ids=(1, 2),
        token_ids=(10, 11, 12, 13),
        exits=(2, 8, 2, 4),
        confidences=(0.9, 0.3, 0.85, 1.0),
        logprobs=(-0.1, -2.5, -0.2, 0.0),
        finish_reason="length",
        policy=make_exit_policy((2, 4), [0.8, None]),
        sampling_params=SamplingParams(temperature=0.5, seed=3),
        strategy="exact",
        num_layers=8,
        text="".join(PIECES),
        pieces=PIECES,
    )


def _shown(renderable: object, color: bool = False) -> str:
    file = io.StringIO()
    system = "standard" if color else None
    Console(file=file, force_terminal=color, color_system=system, width=100).print(renderable)
    return file.getvalue()


def test_control_characters_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2J\r\tb\n\x9b\x00") == "a\\x1b[2J\\r\tb\n\\x9b\\x00"
    assert "\x1b" not in _shown(token_table(_output()))


def test_each_exit_has_a_colour() -> None:
    styles = exit_styles(_output().policy, 8)
    assert len(set(styles.values())) == 3
    assert "\x1b[1;32mexit 2" in _shown(legend(_output()), color=True)


def test_legend_has_the_speed() -> None:
    speed = Speed(0.25, 12.5, 0.02, 25.0)
    words = " ".join(_shown(legend(_output(), speed)).splitlines()[-2:]).split()
    assert " ".join(words).split(", ") == [
        "12.5 tokens/s",
        "first token after 0.25 s",
        "2% of drafts accepted",
        "full depth would reach 25.0 tokens/s",
        "0.50 times its speed",
    ]


def test_legend_counts_the_tokens_of_each_exit() -> None:
    lines = _shown(legend(_output())).splitlines()
    assert lines[0].split() == ["exit", "2", "2", "tokens", "50%", "confidence", ">=", "0.8"]
    assert lines[1].split() == ["exit", "4", "1", "tokens", "25%", "off"]
    assert lines[2].split() == ["final", "exit", "1", "tokens", "25%"]
    assert lines[3] == "mean depth 4.00 of 8 layers, 4 tokens, finished by --max-tokens"


@pytest.mark.parametrize("reason", get_args(FinishReason))
def test_legend_knows_every_finish_reason(reason: FinishReason) -> None:
    output = dataclasses.replace(_output(), finish_reason=reason)
    assert "tokens, finished by " in _shown(legend(output))


def test_table_has_a_row_for_each_token() -> None:
    header, *rows = _shown(token_table(_output())).splitlines()
    assert header.split() == ["#", "token", "id", "exit", "max_probability", "log", "p"]
    assert rows[1].split() == ["1", "'[red]'", "11", "8", "0.3000", "-2.5000"]
    assert len(rows) == 4
