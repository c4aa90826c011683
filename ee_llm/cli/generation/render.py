"""Render a generation for a terminal: text coloured by exit, a legend, a table of tokens."""

from rich.table import Table
from rich.text import Text

from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.speed import Speed

# Tokens of the final exit have the terminal's default colour. Coloured tokens were cheaper.
_COLORS = ("green", "cyan", "yellow", "magenta", "blue", "red")


def exit_styles(policy: ExitPolicy, num_layers: int) -> dict[int, str]:
    """Return the terminal style of each exit by boundary, shallow to deep."""
    boundaries = policy.boundaries
    styles = {b: f"bold {_COLORS[i % len(_COLORS)]}" for i, b in enumerate(boundaries)}
    return {**styles, num_layers: "default"}


def printable(text: str) -> str:
    """Return `text` with control characters, which could change the terminal, made visible."""
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def legend(output: RequestOutput, speed: Speed | None = None) -> Text:
    """Return a line per exit with its share of the tokens, then totals and the speed."""
    num_tokens, num_layers = len(output.token_ids), output.num_layers
    lines = Text()
    for boundary, style in exit_styles(output.policy, num_layers).items():
        count = output.exits.count(boundary)
        lines.append(f"{_exit_name(boundary, num_layers):<10}", style=style)
        lines.append(f" {count:>5} tokens {count / num_tokens:>5.0%}")
        threshold = output.policy.threshold(boundary)
        if boundary != num_layers:
            lines.append("  off" if threshold is None else f"  confidence >= {threshold:g}")
        lines.append("\n")
    lines.append(
        f"mean depth {output.mean_depth:.2f} of {num_layers} layers,"
        f" {num_tokens} tokens, finished by {_FINISH[output.finish_reason]}"
    )
    if speed is not None:
        lines.append(f"\n{speed_line(speed)}")
    return lines


def speed_line(speed: Speed) -> str:
    """Return the measured speed in one line."""
    parts = []
    if speed.tokens_per_second is not None:
        parts.append(f"{speed.tokens_per_second:,.1f} tokens/s")
    if speed.time_to_first_token_s is not None:
        parts.append(f"first token after {speed.time_to_first_token_s:.2f} s")
    if speed.acceptance is not None:
        parts.append(f"{speed.acceptance:.0%} of drafts accepted")
    if speed.full_tokens_per_second is not None:
        parts.append(f"full depth would reach {speed.full_tokens_per_second:,.1f} tokens/s")
    if speed.against_full is not None:
        parts.append(f"{speed.against_full:.2f} times its speed")
    return ", ".join(parts)


def token_table(output: RequestOutput) -> Table:
    """Return a table with a row for each new token: text, exit, confidence, log probability."""
    styles = exit_styles(output.policy, output.num_layers)
    table = Table(box=None, pad_edge=False)
    for name in ("#", "token", "id", "exit", output.policy.measure, "log p"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for index, token in enumerate(output.tokens):
        table.add_row(
            str(index),
            Text(repr(token.text), style=styles[token.exit]),
            str(token.token_id),
            Text(str(token.exit), style=styles[token.exit]),
            f"{token.confidence:.4f}",
            f"{token.logprob:.4f}",
        )
    return table


_FINISH = {
    "eos": "an end token",
    "stop": "a stop string or token",
    "abort": "an abort",
    "length": "--max-tokens",
    "context": "the model's context length",
    "error": "an error",
}


def _exit_name(boundary: int, num_layers: int) -> str:
    return "final exit" if boundary == num_layers else f"exit {boundary}"
