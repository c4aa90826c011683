"""How a generation is shown to people: text coloured by exit, a legend, a table of tokens."""

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from ee_llm.inference.generator import Generation

# The final exit has the terminal's own colour: what is coloured was cheaper.
_COLORS = ("green", "cyan", "yellow", "magenta", "blue", "red")


def token_pieces(
    decode: Callable[[list[int]], str], prompt: Sequence[int], tokens: Sequence[int]
) -> list[str]:
    """Return the text that each of `tokens` adds after `prompt`: joined, the whole new text.

    A character of several tokens belongs to the last of them. `decode` turns token ids into text.
    """
    pieces = []
    sequence = list(prompt)
    length = len(decode(sequence))
    for index, token in enumerate(tokens, start=1):
        sequence.append(token)
        text = decode(sequence)
        if index < len(tokens):  # replacement characters at the end stand for an unfinished one
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(text[length:])
        length = max(length, len(text))
    return pieces


def cut_pieces(pieces: Sequence[str], length: int) -> list[str]:
    """Return the pieces of the first `length` characters; those that follow become empty."""
    kept = []
    for piece in pieces:
        kept.append(piece[:length])
        length -= len(kept[-1])
    return kept


def exit_styles(generation: Generation, num_layers: int) -> dict[int, str]:
    """Return the terminal style of each exit by boundary, shallow to deep."""
    boundaries = generation.policy.boundaries
    styles = {b: f"bold {_COLORS[i % len(_COLORS)]}" for i, b in enumerate(boundaries)}
    return {**styles, num_layers: "default"}


def printable(text: str) -> str:
    """Return `text` with the control characters that could drive a terminal made visible."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def colored_text(
    prompt: str, pieces: Sequence[str], generation: Generation, num_layers: int
) -> Text:
    """Return the prompt, dimmed, and the new text, each token in the colour of its exit."""
    styles = exit_styles(generation, num_layers)
    shown = Text.assemble((printable(prompt), "dim"))
    for piece, boundary in zip(pieces, generation.exits, strict=True):
        shown.append(printable(piece), style=styles[boundary])
    return shown


def legend(generation: Generation, num_layers: int) -> Text:
    """Return one line for each exit with its share of the tokens, and one of totals."""
    num_tokens = len(generation.tokens)
    lines = Text()
    for boundary, style in exit_styles(generation, num_layers).items():
        count = generation.exits.count(boundary)
        lines.append(f"{_exit_name(boundary, num_layers):<10}", style=style)
        lines.append(f" {count:>5} tokens {count / num_tokens:>5.0%}")
        threshold = generation.policy.threshold(boundary)
        if boundary != num_layers:
            lines.append("  off" if threshold is None else f"  confidence >= {threshold:g}")
        lines.append("\n")
    lines.append(
        f"mean depth {generation.mean_depth:.2f} of {num_layers} layers,"
        f" {num_tokens} tokens, finished by {_FINISH[generation.finish_reason]}"
    )
    return lines


def token_table(pieces: Sequence[str], generation: Generation, num_layers: int) -> Table:
    """Return a table with a row for each new token: text, exit, confidence, log probability."""
    styles = exit_styles(generation, num_layers)
    table = Table(box=None, pad_edge=False)
    for name in ("#", "token", "id", "exit", generation.policy.measure, "log p"):
        table.add_column(name, justify="left" if name == "token" else "right")
    rows = zip(
        pieces,
        generation.tokens,
        generation.exits,
        generation.confidences,
        generation.logprobs,
        strict=True,
    )
    for index, (piece, token, boundary, confidence, logprob) in enumerate(rows):
        table.add_row(
            str(index),
            Text(repr(piece), style=styles[boundary]),
            str(token),
            Text(str(boundary), style=styles[boundary]),
            f"{confidence:.4f}",
            f"{logprob:.4f}",
        )
    return table


_FINISH = {
    "eod": "end of document",
    "stop": "a text or token to stop at",
    "abort": "an abort",
    "length": "the number asked for",
    "context": "the model's context",
    "error": "tokens without a text",
}


def _exit_name(boundary: int, num_layers: int) -> str:
    return "final exit" if boundary == num_layers else f"exit {boundary}"
