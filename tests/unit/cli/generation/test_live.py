"""Test live text: printed immediately, coloured by exit, without parts of stop strings."""

import io

from rich.console import Console

from ee_llm.cli.generation.live import LiveText
from ee_llm.data.tokenization.tokenizer import BytesTokenizer
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import TokenOutput
from ee_llm.inference.text.detokenizer import GeneratedText

POLICY = make_exit_policy((2, 4), [0.8, None])
TOKENIZER = BytesTokenizer()


class Generation:
    """A generation that is shown in a console as its tokens arrive."""

    def __init__(self, file: io.StringIO, stops: tuple[str, ...] = (), color: bool = False) -> None:
        system = "standard" if color else None
        console = Console(file=file, force_terminal=color, color_system=system, width=20)
        self.text = GeneratedText(TOKENIZER.decode, [65], stops)
        self.live = LiveText(console, self.text, POLICY, 8)

    def add(self, tokens: list[TokenOutput]) -> None:
        for token in tokens:
            self.text.add(token.token_id)
            self.live.show(token.exit)

    def finish(self) -> str:
        """Show the rest of the text and return the whole text."""
        self.text.finish()
        self.live.finish()
        return self.text.text


def _tokens(text: str, *exits: int) -> list[TokenOutput]:
    tokens = TOKENIZER.encode(text)
    return [TokenOutput(token, exits[i % len(exits)], 0.5, -1.0) for i, token in enumerate(tokens)]


def test_text_is_printed_immediately_and_not_wrapped() -> None:
    file = io.StringIO()
    generation = Generation(file)
    generation.live.prompt("[red]prompt\x1b[31m ")
    long = "a\tb [bold]x[/bold] :smile:  \n" + 50 * "word "
    for index, token in enumerate(_tokens(long, 2, 8), start=1):
        generation.add([token])
        assert file.getvalue() == "[red]prompt\\x1b[31m " + long[:index]
    assert generation.finish() == long


def test_each_token_has_the_color_of_its_exit() -> None:
    file = io.StringIO()
    Generation(file, color=True).add(_tokens("ab", 2, 8))
    assert file.getvalue() == "\x1b[1;32ma\x1b[0m\x1b[39mb\x1b[0m"


def test_no_part_of_a_stop_string_is_printed() -> None:
    file = io.StringIO()
    generation = Generation(file, ("STOP",))
    for token, shown in zip(_tokens("abSTOPS", 8), ("", "", "", "a", "ab"), strict=False):
        generation.add([token])
        assert file.getvalue() == shown
    generation.add(_tokens("P", 8))
    assert file.getvalue() == "ab"
    assert generation.finish() == "ab" == file.getvalue()
    file = io.StringIO()
    generation = Generation(file, ("STOP",))
    generation.add(_tokens("aSTO", 2))
    assert generation.finish() == "aSTO" == file.getvalue()  # The stop string was not completed.
