"""Show a continuation while it is generated: coloured by exit on a terminal, plain elsewhere."""

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from ee_llm.cli.generation.render import exit_styles, printable
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.text.detokenizer import GeneratedText


class LiveText:
    """Print the text of a generation as its tokens arrive, each in the colour of its exit.

    Text that may be the start of a stop string is printed once it turns out not to be one.
    """

    def __init__(
        self, console: Console, text: GeneratedText, policy: ExitPolicy, num_layers: int
    ) -> None:
        self._console = console
        self._text = text
        self._styles = exit_styles(policy, num_layers)
        self._exits: list[int] = []
        self._piece = 0  # index of the next piece to print
        self._start = 0  # its first character that is not printed yet
        self._num_printed = 0

    def prompt(self, text: str) -> None:
        """Print the prompt, dimmed."""
        self._print(text, "dim")

    def show(self, exit: int) -> None:
        """Print the text that is final after another token, which exited at `exit`."""
        self._exits.append(exit)
        self._print_to(self._text.num_safe)

    def finish(self) -> None:
        """Print the rest of the text."""
        self._print_to(self._text.num_characters)

    def _print_to(self, length: int) -> None:
        pieces = self._text.pieces
        while self._num_printed < length and self._piece < min(len(pieces), len(self._exits)):
            piece, boundary = pieces[self._piece], self._exits[self._piece]
            part = piece[self._start : self._start + length - self._num_printed]
            self._print(part, self._styles[boundary])
            self._num_printed += len(part)
            self._start += len(part)
            if self._start == len(piece):
                self._piece, self._start = self._piece + 1, 0

    def _print(self, text: str, style: str) -> None:
        if text:  # A segment is neither wrapped nor parsed for markup.
            segment = Segment(printable(text), Style.parse(style))
            self._console.print(Segments([segment]), end="", soft_wrap=True)
