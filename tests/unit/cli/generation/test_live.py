"""Text on its way: printed as it comes, coloured by exit, never a part of a stop string."""

import io

from rich.console import Console

from ee_llm.cli.generation.live import LiveText
from ee_llm.data.tokenization.tokenizer import BytesTokenizer
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.text.detokenizer import GeneratedText
from ee_llm.inference.verification.reference_decoding import TokenOutput

POLICY = make_exit_policy((2, 4), [0.8, None])
TOKENIZER = BytesTokenizer()


def _live(file: io.StringIO, stops: tuple[str, ...] = (), color: bool = False) -> LiveText:
    system = "standard" if color else None
    console = Console(file=file, force_terminal=color, color_system=system, width=20)
    return LiveText(console, GeneratedText(TOKENIZER.decode, [65], stops), POLICY, 8)


def _decisions(text: str, *exits: int) -> list[TokenOutput]:
    tokens = TOKENIZER.encode(text)
    return [TokenOutput(token, exits[i % len(exits)], 0.5, -1.0) for i, token in enumerate(tokens)]


def test_text_is_printed_as_it_comes_and_not_wrapped() -> None:
    file = io.StringIO()
    live = _live(file)
    live.prompt("[red]prompt\x1b[31m ")
    long = "a\tb [bold]x[/bold] :smile:  \n" + 50 * "word "
    for index, token_output in enumerate(_decisions(long, 2, 8), start=1):
        live.show([token_output])
        assert file.getvalue() == "[red]prompt\\x1b[31m " + long[:index]
    assert live.finish() == long


def test_each_token_has_the_colour_of_its_exit() -> None:
    file = io.StringIO()
    live = _live(file, color=True)
    live.show(_decisions("ab", 2, 8))
    assert file.getvalue() == "\x1b[1;32ma\x1b[0m\x1b[39mb\x1b[0m"


def test_a_stop_string_is_never_seen_in_part() -> None:
    file = io.StringIO()
    live = _live(file, ("STOP",))
    for token_output, shown in zip(_decisions("abSTOPS", 8), ("", "", "", "a", "ab"), strict=False):
        live.show([token_output])
        assert file.getvalue() == shown
    live.show(_decisions("P", 8))
    assert file.getvalue() == "ab"
    assert live.finish() == "ab" == file.getvalue()
    file = io.StringIO()
    live = _live(file, ("STOP",))
    live.show(_decisions("aSTO", 2))
    assert live.finish() == "aSTO" == file.getvalue()  # it did not become one
