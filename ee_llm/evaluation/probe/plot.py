"""Draw the agreement of a probe over the boundaries."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from ee_llm.evaluation.plot import check_suffix, new_figure, save_figure

# The palette of Okabe and Ito, which is safe for color-blind readers. Markers differ too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"


def save_probe_plot(
    path: Path,
    title: str,
    boundaries: Sequence[int],
    fitted: Sequence[tuple[float, float]],
    bare: Sequence[float],
    classes: Mapping[str, Sequence[float]],
    recommended: Sequence[int],
) -> None:
    """Write a picture with two panels, as PNG or SVG by the suffix of `path`.

    Args:
        path: The file to write.
        title: Title of the picture.
        boundaries: The boundaries, in order of depth.
        fitted: Agreement of each least-squares exit, and its margin.
        bare: Agreement of each residual stream without a fit.
        classes: Agreement of each least-squares exit, by label of the class of tokens.
        recommended: Boundaries to mark.
    """
    check_suffix(path)
    figure = new_figure((11, 4))
    left, right = figure.subplots(1, 2, sharey=True)
    values, margins = ([100 * x for x in column] for column in zip(*fitted, strict=True))
    left.errorbar(
        boundaries, values, margins, color=_COLORS[0], marker=_MARKERS[0], markersize=4, capsize=2,
        label="least-squares exit",
    )  # fmt: skip
    left.plot(
        boundaries, [100 * x for x in bare], color=_COLORS[1], marker=_MARKERS[1], markersize=4,
        linestyle="--", label="without least squares",
    )  # fmt: skip
    styles = zip(classes.items(), cycle(_COLORS), cycle(_MARKERS), strict=False)
    for (label, shares), color, marker in styles:
        right.plot(
            boundaries, [100 * x for x in shares], color=color, marker=marker, markersize=3.5,
            linewidth=1.2, label=label,
        )  # fmt: skip
    for panel in (left, right):
        for boundary in recommended:
            panel.axvline(boundary, color="0.35", linestyle=":", linewidth=1.2)
        panel.set_xlabel("layers before the exit")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("agreement with the final exit (%)")
    if recommended:
        left.plot([], [], color="0.35", linestyle=":", linewidth=1.2, label="recommended exit")
    left.legend(fontsize="small", frameon=False)
    if classes:
        right.legend(
            title="next token", fontsize="small", title_fontsize="small", frameon=False,
            loc="center left", bbox_to_anchor=(1, 0.5),
        )  # fmt: skip
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)
