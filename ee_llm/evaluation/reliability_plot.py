"""Draw reliability diagrams: the agreement of exits over their confidence."""

from collections.abc import Mapping, Sequence
from typing import Any

from ee_llm.evaluation.plot import COLOR, new_figure
from ee_llm.evaluation.reliability import ReliabilityBin, calibration_error

_MAX_COLUMNS = 3
_MAX_AREA = 220.0  # of a marker, in square points


def draw_reliability(
    bins: Mapping[int, Sequence[ReliabilityBin]], text_color: str = "black", title: str = ""
) -> Any:
    """Return a figure with a reliability diagram of each exit and its calibration error.

    The area of a marker is proportional to the share of tokens in its bin. A perfectly calibrated
    exit is on the diagonal.

    Args:
        bins: The bins of each exit, least confident first, by boundary.
        text_color: Color of the text and the axes.
        title: Title of the figure.
    """
    num_columns = min(_MAX_COLUMNS, len(bins))
    num_rows = -(-len(bins) // num_columns)
    figure = new_figure((2.6 * num_columns, 2.7 * num_rows + 0.3 * bool(title)))
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(bins) :]:
        panel.set_visible(False)
    for panel, (boundary, found) in zip(panels.flat, bins.items(), strict=False):
        confidence = [one.confidence for one in found]
        agreement = [one.agreement for one in found]
        total = sum(one.num_tokens for one in found)
        areas = [12.0 + _MAX_AREA * one.num_tokens / total for one in found]
        panel.plot([0, 1], [0, 1], color=text_color, linewidth=0.8, linestyle=":")
        panel.plot(confidence, agreement, color=COLOR, linewidth=1.2)
        # Markers are not clipped at the edge, since confidences near 1 are the most frequent.
        panel.scatter(confidence, agreement, s=areas, color=COLOR, alpha=0.8, clip_on=False)
        if (error := calibration_error(found)) is not None:
            panel.text(0.04, 0.92, f"error {error:.3f}", color=text_color, fontsize="small")
        panel.set_title(f"exit {boundary}", color=text_color, fontsize="medium")
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        panel.grid(alpha=0.25)
        panel.tick_params(colors=text_color)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(text_color)
    figure.supxlabel("confidence", color=text_color, fontsize="medium")
    figure.supylabel("agreement", color=text_color, fontsize="medium")
    if title:
        figure.suptitle(title, color=text_color, fontsize="medium")
    return figure
