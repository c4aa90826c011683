"""Plot the loss of every exit over the steps of a run."""

import json
import re
from pathlib import Path

from ee_llm.errors import UserError
from ee_llm.training.reporting.run_log import LOG

# The palette of Okabe and Ito, which is safe for color-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")

_LOSS = re.compile(r"(exit (\d+)|lm) loss( validation)?")


def read_losses(output: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, loss) pairs by the loss's name in the log, early exits first, "lm loss" last.

    Raises:
        UserError: The run directory `output` has no log, or no loss in its log.
    """
    path = Path(output) / LOG
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give the output directory of a training run.")
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").strip().split("\n"):
        entry = json.loads(line)
        for name, value in entry.items():
            if _LOSS.fullmatch(name) and value is not None:
                curves.setdefault(name, []).append((entry["step"], value))
    if not curves:
        raise UserError(f"{path} has no losses yet. Train for at least logging.interval steps.")
    return dict(sorted(curves.items(), key=_order))


def _order(curve: tuple[str, list[tuple[int, float]]]) -> tuple[float, bool]:
    match = _LOSS.fullmatch(curve[0])
    assert match is not None
    return float(match[2] or "inf"), match[3] is not None


def plot_losses(output: str | Path, picture: str | Path, baseline: float | None = None) -> None:
    """Plot the losses of the run in `output` into the file `picture`.

    Lines are training losses, dots are validation losses.

    Args:
        output: The run directory.
        picture: The file to write, PNG or SVG by its suffix.
        baseline: The unigram entropy of the data in nats, drawn as a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = read_losses(output)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    names = [name for name in curves if not name.endswith("validation")]
    for name, color in zip(names, COLORS * len(names), strict=False):
        label = "final exit" if name == "lm loss" else name.removesuffix(" loss")
        axes.plot(*zip(*curves[name], strict=True), color=color, linewidth=1.2, label=label)
        if validation := curves.get(f"{name} validation"):
            axes.plot(*zip(*validation, strict=True), "o", color=color, markersize=4)
    if baseline is not None:
        axes.axhline(baseline, color="#777777", linestyle="--", linewidth=1)
        axes.annotate(
            "unigram entropy",
            (1, baseline),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color="#555555",
        )
    axes.set(
        xlabel="step", ylabel="loss (nats per token)", title="lines: training, dots: validation"
    )
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
