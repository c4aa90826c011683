"""Test texts coloured by exit: contrast, and differences with any colour blindness."""

import itertools

import pytest

from ee_llm.inference.outputs import TokenOutput
from ee_llm.inference.text.html import EXIT_COLORS, FINAL_COLOR, colored_html, exit_style

# Linear RGB as seen without one kind of cone (Machado et al. 2009, severity 1).
MATRICES = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
                   (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
                     (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
                   (0.004733, 0.691367, 0.303900)),
}  # fmt: skip


def linear(color: str) -> list[float]:
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def lab(rgb: list[float]) -> list[float]:
    r, g, b = (min(1.0, max(0.0, v)) for v in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def seen(color: str, kind: str) -> list[float]:
    rgb = linear(color)
    return lab([sum(m * v for m, v in zip(row, rgb, strict=True)) for row in MATRICES[kind]])


@pytest.mark.parametrize("kind", MATRICES)
def test_colours_differ_with_colour_blindness(kind: str) -> None:
    """A difference (CIE 1976) of 30 is clearly visible."""
    for one, other in itertools.combinations([*EXIT_COLORS, FINAL_COLOR], 2):
        pairs = zip(seen(one, kind), seen(other, kind), strict=True)
        assert sum((a - b) ** 2 for a, b in pairs) ** 0.5 > 30, (one, other)


@pytest.mark.parametrize("color", [*EXIT_COLORS, FINAL_COLOR])
def test_the_contrast_with_the_background_is_sufficient(color: str) -> None:
    r, g, b = linear(color)
    assert 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) >= 4.5


def test_every_exit_has_a_different_style() -> None:
    boundaries = tuple(range(1, 9))
    styles = [exit_style(boundary, boundaries) for boundary in (*boundaries, 12)]
    assert len({*styles}) == 9
    assert styles[-1] == f"color:{FINAL_COLOR}"


def test_html_escapes_tokens_and_has_counts_and_tooltips() -> None:
    tokens = [
        TokenOutput(1, 2, 0.9, -0.1, "<a>"),
        TokenOutput(2, 2, 0.8, -0.2, ""),
        TokenOutput(3, 6, 0.5, -0.3, "b\n"),
    ]
    html = colored_html("p & q", tokens, (2, 4), 6)
    assert "p &amp; q" in html
    assert "&lt;a&gt;" in html
    assert html.count("<span") == 1 + 2 + 2 + 1  # prompt, tokens, exits taken, mean depth
    assert "exit 2, confidence 0.900, log probability -0.100" in html
    assert "exit 4" not in html
    assert "mean depth 3.33 of 6 layers" in html
