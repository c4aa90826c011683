"""Charts as SVG to be embedded in an HTML page: without references, in the page's text color."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ee_llm.evaluation.plot import save_figure
from ee_llm.evaluation.reliability import ReliabilityBin
from ee_llm.evaluation.reliability_plot import draw_reliability
from ee_llm.evaluation.sweep.plot import Mark, draw_front

_TEXT_COLOR = "#010203"  # Nothing else is drawn in it, so that it can be replaced.
_FRONT_SIZE = (5.4, 4.6)  # inches; texts stay readable on a phone


def front_svg(marks: Sequence[Mark], min_agreement: float, label: str) -> str:
    """Return the picture of a sweep; `label` describes it to those who cannot see it."""
    figure = draw_front(marks, min_agreement, _TEXT_COLOR, _FRONT_SIZE)
    return inline_svg(figure, label, "front")


def reliability_svg(bins: Mapping[int, Sequence[ReliabilityBin]], label: str) -> str:
    """Return the reliability diagrams of all exits; `label` describes them like that of a sweep."""
    return inline_svg(draw_reliability(bins, _TEXT_COLOR), label, "reliability")


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
