"""Draw metrics of the exits over their depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError

SUFFIXES = (".png", ".svg")
_COLOR = "#0072B2"  # of the palette of Okabe and Ito, which is safe for color-blind readers


def check_suffix(path: Path) -> None:
    """Raise RequestError if the suffix of `path` is neither .png nor .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(
            f"plot = {path} is not a picture. Use a name that ends in {' or '.join(SUFFIXES)}."
        )


def save_plot(
    path: Path,
    title: str,
    boundaries: Sequence[int],
    panels: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Write a picture with a panel for each metric, as PNG or SVG by the suffix of `path`.

    Args:
        path: The file to write.
        title: Title of the picture.
        boundaries: The exits, in order of depth.
        panels: The value of each exit and its margin, by the label of the metric.
    """
    check_suffix(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained"
    )
    for panel, (label, points) in zip(axes, panels.items(), strict=True):
        values, margins = zip(*points, strict=True)
        panel.errorbar(
            boundaries, values, margins, color=_COLOR, marker="o", markersize=4, capsize=3
        )
        panel.set(xlabel="layers before the exit", ylabel=label, xticks=boundaries)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    write_figure(figure, path)


def write_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG or SVG by the suffix of `path`, and close it."""
    import matplotlib
    from matplotlib import pyplot

    # Text stays text, and equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ee_llm"}):
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)
    pyplot.close(figure)
