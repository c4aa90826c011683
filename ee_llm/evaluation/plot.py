"""Draw the metrics of the exits over their depth."""

from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.evaluation.result import EvaluationResult

SUFFIXES = (".png", ".svg")
_COLOR = "#0072B2"  # of the palette of Okabe and Ito, which is safe for color-blind readers


def check_suffix(path: Path) -> None:
    """Raise RequestError if the suffix of `path` is neither .png nor .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(
            f"plot = {path} is not a picture. Use a name that ends in {' or '.join(SUFFIXES)}."
        )


def save_plot(result: EvaluationResult, path: Path) -> None:
    """Write the loss and the agreement of the exits to `path`, as PNG or SVG by its suffix."""
    check_suffix(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    boundaries = [one.boundary for one in result.exits]
    panels: dict[str, list[tuple[float, float]]] = {
        "loss (nats per token)": [(one.loss, one.loss_margin or 0.0) for one in result.exits],
        "agreement with the final exit (%)": [
            (100 * one.agreement, 100 * (one.agreement_margin or 0.0)) for one in result.exits
        ],
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for panel, (label, points) in zip(axes, panels.items(), strict=True):
        values, margins = zip(*points, strict=True)
        panel.errorbar(
            boundaries, values, margins, color=_COLOR, marker="o", markersize=4, capsize=3
        )
        panel.set(xlabel="layers before the exit", ylabel=label, xticks=boundaries)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    title = f"{result.num_tokens:,} tokens"
    if result.final.loss_margin is not None:
        title += ", bars: 95 % confidence"
    figure.suptitle(title, fontsize="medium")
    # Text stays text, and equal results give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ee_llm"}):
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)
    pyplot.close(figure)
