"""Draw metrics of the exits over their depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ee_llm.errors import RequestError

SUFFIXES = (".png", ".svg")
COLOR = "#0072B2"  # of the palette of Okabe and Ito, which is safe for color-blind readers


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
    figure = new_figure((4 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels))
    for panel, (label, points) in zip(axes, panels.items(), strict=True):
        values, margins = zip(*points, strict=True)
        panel.errorbar(
            boundaries, values, margins, color=COLOR, marker="o", markersize=4, capsize=3
        )
        panel.set(xlabel="layers before the exit", ylabel=label, xticks=boundaries)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of a size in inches that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, file: Path | IO[bytes], suffix: str = ".svg") -> None:
    """Write a figure. Equal figures give equal files.

    Args:
        figure: The figure.
        file: The file to write. The suffix of a path selects the format.
        suffix: The format if `file` is an open file: .png or .svg.
    """
    import matplotlib

    suffix = file.suffix.lower() if isinstance(file, Path) else suffix
    metadata: dict[str, Any] = {"Date": None} if suffix == ".svg" else {}
    # Text stays text in SVG.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ee_llm"}):
        figure.savefig(file, dpi=150, metadata=metadata, format=suffix[1:])
