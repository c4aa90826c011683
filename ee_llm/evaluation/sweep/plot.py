"""Draw agreement with the full model over speed-up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ee_llm.evaluation.plot import check_suffix, new_figure, save_figure

# The palette of Okabe and Ito, which is safe for color-blind readers, and a marker for each family.
_STYLES = {
    "full": ("#000000", "s", "full model"),
    "thresholds": ("#0072B2", "o", "thresholds"),
    "policy": ("#CC79A7", "D", "policy file"),
    "self-speculative": ("#D55E00", "^", "self-speculative"),
}
_FRONT_COLOR = "#777777"
_LEAST_SPAN = 0.02  # of agreement, so that points that differ by rounding lie on one line


class Mark(NamedTuple):
    """A point of the picture: its family, name, place with intervals, and how it stands out."""

    family: str
    name: str
    speedup: tuple[float, float, float]
    agreement: tuple[float, float, float]
    is_on_front: bool
    is_recommended: bool


def save_front(path: Path, marks: Sequence[Mark], min_agreement: float) -> None:
    """Write the picture, as PNG or SVG by the suffix of `path`.

    Args:
        path: The file to write.
        marks: The points.
        min_agreement: Least agreement of the recommended point, drawn as a line.
    """
    check_suffix(path)
    save_figure(draw_front(marks, min_agreement), path)


def draw_front(
    marks: Sequence[Mark],
    min_agreement: float,
    text_color: str = "#000000",
    size: tuple[float, float] = (7.2, 4.6),
) -> Any:
    """Return the picture as a figure.

    Args:
        marks: The points.
        min_agreement: Least agreement of the recommended point, drawn as a line.
        text_color: Color of texts and axes.
        size: Size in inches.
    """
    figure = new_figure(size)
    axes = figure.subplots()
    for family, (color, marker, label) in _STYLES.items():
        members = [mark for mark in marks if mark.family == family]
        if not members:
            continue
        color = text_color if family == "full" else color
        axes.errorbar(
            *_places(members),
            xerr=_errors([mark.speedup for mark in members], 1.0),
            yerr=_errors([mark.agreement for mark in members], 100.0),
            color=color,
            linestyle="none",
            elinewidth=0.8,
            alpha=0.3,
        )
        axes.plot(
            *_places(members),
            color=color,
            marker=marker,
            label=label,
            linestyle="none",
            markersize=7,
        )
    front = sorted((mark for mark in marks if mark.is_on_front), key=lambda mark: mark.speedup[1])
    axes.plot(
        *_places(front), color=_FRONT_COLOR, linewidth=1.2, linestyle="--", label="front", zorder=1
    )
    axes.axhline(
        100 * min_agreement, color=_FRONT_COLOR, linewidth=0.8, linestyle=":", label="wanted"
    )
    for mark in front:
        if not mark.is_recommended:
            _write(axes, mark, mark.name, (6, 6), color=text_color, fontsize="x-small")
    best = next(mark for mark in marks if mark.is_recommended)
    axes.plot(
        *_places([best]),
        marker="o",
        markersize=15,
        fillstyle="none",
        color=text_color,
        linestyle="none",
    )
    name = "exits off" if best.family == "full" else best.name
    middle = sum(edge(mark.speedup[1] for mark in marks) for edge in (min, max)) / 2
    is_right = best.speedup[1] > middle
    _write(
        axes,
        best,
        f"recommended: {name}",
        (10 if is_right else -10, -22),
        ha="right" if is_right else "left",
        color=text_color,
        fontweight="bold",
        fontsize="small",
    )
    least = 100 * min(mark.agreement[1] for mark in marks)
    span = max(100 * _LEAST_SPAN, 100.0 - least)
    axes.set_ylim(100.0 - 1.15 * span, 100.0 + 0.06 * span)
    axes.set_xlabel("measured speed-up over the full model", color=text_color)
    axes.set_ylabel("tokens equal to the full model's (%)", color=text_color)
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    axes.tick_params(colors=text_color)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(text_color)
    figure.legend(
        loc="outside upper center", ncols=3, frameon=False, fontsize="small", labelcolor=text_color
    )
    return figure


def _write(axes: Any, mark: Mark, text: str, offset: tuple[int, int], **style: Any) -> None:
    """Write a text beside a point; `offset` is in typographic points."""
    place = (mark.speedup[1], 100 * mark.agreement[1])
    # Names of policy files may have dollar signs, which matplotlib reads as formulas.
    style["parse_math"] = False
    axes.annotate(text, place, textcoords="offset points", xytext=offset, **style)


def _places(marks: Sequence[Mark]) -> tuple[list[float], list[float]]:
    return [mark.speedup[1] for mark in marks], [100 * mark.agreement[1] for mark in marks]


def _errors(values: Sequence[tuple[float, float, float]], unit: float) -> list[list[float]]:
    """Return the distances to both ends of intervals, for matplotlib."""
    lows = [unit * max(0.0, value - low) for low, value, _ in values]
    return [lows, [unit * max(0.0, high - value) for _, value, high in values]]
