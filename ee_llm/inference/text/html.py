"""Render generated text as HTML, coloured by the exit of each token."""

import html
from collections.abc import Sequence
from typing import Protocol

# Text colours of the early exits, shallow to deep. Their contrast with the white background is at
# least 4.5 (WCAG 2 AA), and people with any kind of colour blindness can distinguish them. Tokens
# of the final exit are black, so coloured text was cheaper.
EXIT_COLORS = ("#327d6e", "#a44aba", "#911d00", "#5300cf")
FINAL_COLOR = "#1a1a1a"
_PROMPT_COLOR = "#6a6a6a"
_BOX = (
    "background:#ffffff;color:#1a1a1a;border:1px solid #d0d0d0;border-radius:6px;"
    "padding:8px 10px;font-family:ui-monospace,monospace;line-height:1.5"
)


class Token(Protocol):
    """The attributes of a token that are shown."""

    @property
    def text(self) -> str: ...
    @property
    def exit(self) -> int: ...
    @property
    def confidence(self) -> float: ...
    @property
    def logprob(self) -> float: ...


def exit_style(boundary: int, boundaries: Sequence[int]) -> str:
    """Return the CSS of tokens that exited at a boundary.

    There are four colours; the fifth to eighth exits have the same ones, underlined.

    Args:
        boundary: Where the token exited; one that is not in `boundaries` is the final exit.
        boundaries: The early exits of the model, shallow to deep.
    """
    if boundary not in boundaries:
        return f"color:{FINAL_COLOR}"
    round_, color = divmod(list(boundaries).index(boundary), len(EXIT_COLORS))
    style = f"color:{EXIT_COLORS[color]};font-weight:600"
    return f"{style};text-decoration:underline" if round_ % 2 else style


def colored_html(
    prompt: str, tokens: Sequence[Token], boundaries: Sequence[int], num_layers: int
) -> str:
    """Return HTML of a prompt and its continuation, with a legend of the exits that were used.

    A tooltip gives the exit, confidence and log probability of each token.
    """
    spans = [_span(token, boundaries, num_layers) for token in tokens]
    counts = {b: sum(token.exit == b for token in tokens) for b in (*boundaries, num_layers)}
    legend = " &nbsp; ".join(
        f'<span style="{exit_style(b, boundaries)}">{_name(b, num_layers)}</span> {count}'
        for b, count in counts.items()
        if count
    )
    depth = sum(token.exit for token in tokens) / max(1, len(tokens))
    return (
        f'<div class="ee-llm-output" style="{_BOX}"><div style="white-space:pre-wrap">'
        f'<span style="color:{_PROMPT_COLOR}">{html.escape(prompt)}</span>{"".join(spans)}</div>'
        f'<div style="margin-top:6px;font-size:85%;color:{_PROMPT_COLOR}">{legend} &nbsp; '
        f'<span style="white-space:nowrap">mean depth {depth:.2f} of {num_layers} layers</span>'
        f"</div></div>"
    )


def _span(token: Token, boundaries: Sequence[int], num_layers: int) -> str:
    if not token.text:
        return ""
    title = (
        f"{_name(token.exit, num_layers)}, confidence {token.confidence:.3f},"
        f" log probability {token.logprob:.3f}"
    )
    style = exit_style(token.exit, boundaries)
    return f'<span style="{style}" title="{title}">{html.escape(token.text)}</span>'


def _name(boundary: int, num_layers: int) -> str:
    return "final exit" if boundary == num_layers else f"exit {boundary}"
