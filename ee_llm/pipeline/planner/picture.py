"""Draw the timeline of a plan, with one row per rank and time from left to right."""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Op
from ee_llm.pipeline.planner.predict import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The color of each kind and of the text on it: the palette of Okabe and Ito, which is safe for
# color-blind readers, with one paler variant.
KINDS = {
    "forward": ("#56B4E9", "#10222e"),
    "backward": ("#0072B2", "#ffffff"),
    "weight gradients": ("#E69F00", "#2b1e00"),
    "exits": ("#D55E00", "#ffffff"),
    "filling, forward": ("#E2B4CE", "#3a1c2c"),
    "filling, backward": ("#CC79A7", "#2b0f1d"),
}
IDLE = "#ECECEC"
# The share of white in the color of a rank's last stage. A backward must not look like a forward.
_FADING = {"forward": 0.55, "backward": 0.15, "exits": 0.55}
SUFFIXES = (".png", ".svg")

_ROW = 0.84  # height, relative to the distance between rows
_INCHES_PER_ROW = 0.42
_WIDTHS = (8.0, 22.0)  # inches, smallest and largest
_CHARACTER = 0.075  # inches, width of a digit of a microbatch's number


def check_suffix(path: Path) -> None:
    """Raise PlanError if the suffix of `path` is neither .png nor .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise PlanError(
            f"--picture {path} is not a picture. Use a name that ends in {' or '.join(SUFFIXES)}."
        )


def save_picture(prediction: Prediction, path: Path, title: str, unit: str, scale: float) -> None:
    """Write the picture of a prediction to `path`, as PNG or SVG by its suffix."""
    check_suffix(path)
    import matplotlib

    figure = draw(prediction, title, unit, scale)
    # Text stays text, and equal predictions give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ee_llm"}):
        metadata: dict[str, Any] = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=130, metadata=metadata)


def draw(prediction: Prediction, title: str, unit: str, scale: float = 1.0) -> "Figure":
    """Return the figure of a prediction.

    The later stages of a rank are lighter than its first. A deferred exit is drawn where it runs,
    at the start of its backward.

    Args:
        prediction: The plan and its times.
        title: Title of the figure.
        unit: Name of the unit of time.
        scale: Length of that unit in the time of the prediction.
    """
    from matplotlib.figure import Figure

    ranks = prediction.simulation.timeline.ranks
    makespan = prediction.simulation.makespan / scale
    shortest = _typical(prediction) / scale
    low, high = _WIDTHS
    width = min(max(makespan / shortest * 0.25 if shortest else low, low), high)
    figure = Figure(figsize=(width, 1.5 + _INCHES_PER_ROW * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    per_unit = 0.92 * width / makespan if makespan else 0.0
    for rank in range(len(ranks)):
        axes.broken_barh([(0.0, makespan)], (rank - _ROW / 2, _ROW), facecolor=IDLE, zorder=0)
        _draw_rank(axes, prediction, rank, scale, per_unit)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
    axes.set_ylim(len(ranks) - 0.45, -0.55)
    axes.set_xlim(0, makespan or 1.0)
    axes.set_xlabel(f"time ({unit})")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _add_legend(figure, axes, prediction.plan.num_stages > len(ranks))
    return figure


def _typical(prediction: Prediction) -> float:
    spans = [span for rank in prediction.simulation.timeline.ranks for span in rank]
    lengths = sorted(s.end - s.start for s in spans if s.end > s.start)
    return lengths[len(lengths) // 4] if lengths else 0.0


def _draw_rank(
    axes: "Axes", prediction: Prediction, rank: int, scale: float, per_unit: float
) -> None:
    stages = prediction.stages_of(rank)
    bars: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for span in prediction.simulation.timeline.ranks[rank]:
        chunk = stages.index(span.action.stage)
        kind = _kind(prediction, span.action.op, span.action.microbatch)
        start, end = span.start, span.end
        part = prediction.exit_part(span)
        if part is not None:
            bars["exits", chunk].append((part[0] / scale, (part[1] - part[0]) / scale))
            start, end = (part[1], end) if part[0] == span.start else (start, part[0])
        if end - start > 0:
            bars[kind, chunk].append((start / scale, (end - start) / scale))
        label = str(span.action.microbatch)
        if (end - start) / scale * per_unit > _CHARACTER * (len(label) + 0.6):
            middle = (start + end) / 2 / scale
            color = KINDS[kind][1]
            axes.text(middle, rank, label, color=color, fontsize=7.5, ha="center", va="center")
    for (kind, chunk), boxes in bars.items():
        shade = _lighter(KINDS[kind][0], _FADING.get(kind, 0.0) * chunk / max(1, len(stages) - 1))
        lines = min(0.6, 6.0 * per_unit * min(length for _, length in boxes))
        axes.broken_barh(
            boxes,
            (rank - _ROW / 2, _ROW),
            facecolor=shade,
            edgecolor="white",
            linewidth=lines,
            gid=kind,
        )


def _kind(prediction: Prediction, op: Op, microbatch: int) -> str:
    if microbatch in prediction.filling:
        return "filling, forward" if op is Op.FORWARD else "filling, backward"
    names = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.WEIGHT: "weight gradients"}
    return names[op]


def _lighter(color: str, share: float) -> tuple[float, float, float]:
    parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part + share * (1 - part) for part in parts)
    return red, green, blue


def _add_legend(figure: "Figure", axes: "Axes", interleaved: bool) -> None:
    from matplotlib.patches import Patch

    drawn = {bars.get_gid() for bars in axes.collections}
    handles = [
        Patch(facecolor=color, label=kind) for kind, (color, _) in KINDS.items() if kind in drawn
    ]
    handles.append(Patch(facecolor=IDLE, label="idle"))
    if interleaved:
        handles.append(Patch(facecolor="none", label="lighter: a rank's later stages"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
