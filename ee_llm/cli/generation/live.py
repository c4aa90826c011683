"""Show a continuation while it is generated: coloured by exit on a terminal, plain elsewhere."""

from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from ee_llm.cli.generation.render import exit_styles, printable
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.text.detokenizer import GeneratedText
from ee_llm.inference.verification.reference_decoding import TokenOutput


class LiveText:
    """Prints the text of a generation as its tokens come, each in the colour of its exit.

    Text that may yet turn out to be a stop string is printed once it is known not to be one.
    """

    def __init__(
        self, console: Console, text: GeneratedText, policy: ExitPolicy, num_layers: int
    ) -> None:
        self._console = console
        self._text = text
        self._styles = exit_styles(policy, num_layers)
        self._exits: list[int] = []
        self._piece = 0  # the next to print, from that character on
        self._start = 0
        self._num_printed = 0

    def prompt(self, text: str) -> None:
        """Print the prompt, dimmed."""
        self._print(text, "dim")

    def show(self, token_outputs: Iterable[TokenOutput]) -> None:
        """Take in new tokens and print the text that is certain with them."""
        for token_output in token_outputs:
            self._text.add(token_output.token)
            self._exits.append(token_output.exit)
        self._print_to(self._text.num_safe)

    def finish(self) -> str:
        """Print the rest of the text, and return all of it."""
        self._text.finish()
        text = self._text.text
        self._print_to(len(text))
        return text

    def _print_to(self, length: int) -> None:
        pieces = self._text.pieces
        while self._num_printed < length and self._piece < len(pieces):
            piece, boundary = pieces[self._piece], self._exits[self._piece]
            part = piece[self._start : self._start + length - self._num_printed]
            self._print(part, self._styles[boundary])
            self._num_printed += len(part)
            self._start += len(part)
            if self._start == len(piece):
                self._piece, self._start = self._piece + 1, 0

    def _print(self, text: str, style: str) -> None:
        if text:  # as a segment: neither wrapped nor taken for markup
            segment = Segment(printable(text), Style.parse(style))
            self._console.print(Segments([segment]), end="", soft_wrap=True)
