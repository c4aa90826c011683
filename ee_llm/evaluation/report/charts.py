"""Charts as SVG to be embedded in an HTML page: without references, in the page's text color."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ee_llm.evaluation.plot import new_figure, save_figure
from ee_llm.evaluation.reliability import ReliabilityBin
from ee_llm.evaluation.sweep.plot import Mark, draw_front

_TEXT_COLOR = "#010203"  # Nothing else is drawn in it, so that it can be replaced.
_COLOR = "#0072B2"  # of the palette of Okabe and Ito, which is safe for color-blind readers
_FRONT_SIZE = (5.4, 4.6)  # inches; texts stay readable on a phone
_MAX_COLUMNS = 3
_MAX_AREA = 220.0  # of a marker, in square points


def front_svg(marks: Sequence[Mark], min_agreement: float, label: str) -> str:
    """Return the picture of a sweep; `label` describes it to those who cannot see it."""
    figure = draw_front(marks, min_agreement, _TEXT_COLOR, _FRONT_SIZE)
    return inline_svg(figure, label, "front")


def reliability_svg(bins: Mapping[int, Sequence[ReliabilityBin]], label: str) -> str:
    """Return a reliability diagram of each exit: agreement over confidence.

    The area of a marker is proportional to the share of tokens in its bin.
    """
    num_columns = min(_MAX_COLUMNS, len(bins))
    num_rows = -(-len(bins) // num_columns)
    figure = new_figure((2.6 * num_columns, 2.7 * num_rows))
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(bins) :]:
        panel.set_visible(False)
    for panel, (boundary, found) in zip(panels.flat, bins.items(), strict=False):
        total = sum(one.num_tokens for one in found)
        panel.plot([0, 1], [0, 1], color=_TEXT_COLOR, linewidth=0.8, linestyle=":")
        panel.plot(
            [one.confidence for one in found],
            [one.agreement for one in found],
            color=_COLOR,
            linewidth=1.2,
        )
        panel.scatter(
            [one.confidence for one in found],
            [one.agreement for one in found],
            s=[12.0 + _MAX_AREA * one.num_tokens / total for one in found],
            color=_COLOR,
            alpha=0.8,
            clip_on=False,  # Confidences near 1 are the most frequent ones.
        )
        panel.set_title(f"exit {boundary}", color=_TEXT_COLOR, fontsize="medium")
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        panel.grid(alpha=0.25)
        panel.tick_params(colors=_TEXT_COLOR)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["bottom", "left"]].set_color(_TEXT_COLOR)
    figure.supxlabel("confidence", color=_TEXT_COLOR, fontsize="medium")
    figure.supylabel("agreement", color=_TEXT_COLOR, fontsize="medium")
    return inline_svg(figure, label, "reliability")


def inline_svg(figure: Any, label: str, name: str) -> str:
    """Return a figure as an <svg> element that refers to nothing outside of itself.

    Args:
        figure: The figure.
        label: Describes it to those who cannot see it.
        name: Begins the ids of its elements. It must be unique on the page.
    """
    file = io.BytesIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    save_figure(figure, file)
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Texts are left alone: the name of a point may look like an attribute.
    text = re.sub(r"<[^>]*>", lambda tag: _embedded(tag[0], name), text)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    opening = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"'
        f' style="width:100%;max-width:{width}pt;height:auto">'
    )
    return opening + text[text.index(">") + 1 :]


def _embedded(tag: str, name: str) -> str:
    """Return a tag with ids that are unique on the page, and with the page's text color."""
    # matplotlib numbers some elements in each figure, and nothing refers to them. The other ids are
    # hashes of shapes, which several figures can have.
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", tag)
    return tag.replace(_TEXT_COLOR, "currentColor")
