"""The result of an evaluation: the metrics of every exit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.evaluation.options import shown_inputs
from ee_llm.evaluation.plot import save_plot


def perplexity_of(loss: float) -> float:
    """Return the exponential of a loss in nats; infinite if it is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class ExitMetrics:
    """How well one exit predicts the text.

    Errors and margins are estimated from blocks of up to 128 neighbouring positions. They are None
    for a text with fewer than 8 blocks.

    Attributes:
        boundary: Number of layers before the exit.
        is_final: Whether this is the final exit.
        loss: Mean negative log probability of the next token, in nats.
        loss_error: Standard error of `loss`.
        loss_margin: Half the width of the 95 % confidence interval of `loss`.
        agreement: Share of positions where the most probable token is that of the final exit.
        agreement_error: Standard error of `agreement`.
        agreement_margin: Half the width of the 95 % confidence interval of `agreement`.
        kl_to_final: Mean divergence KL(final exit || this exit), in nats.
        confidence: Mean probability of the most probable token.
    """

    boundary: int
    is_final: bool
    loss: float
    loss_error: float | None
    loss_margin: float | None
    agreement: float
    agreement_error: float | None
    agreement_margin: float | None
    kl_to_final: float
    confidence: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite for a loss that is too large for a float."""
        return perplexity_of(self.loss)


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """The metrics of every exit on a text; `repr` returns them as a table.

    Attributes:
        checkpoint: Directory of the checkpoint.
        inputs: Prefixes of prepared data, or text files.
        num_tokens: Number of predicted tokens.
        seq_length: Length of a window in tokens.
        dtype: Name of the dtype of the computation.
        exits: The metrics of each exit in order of depth. The last one is the final exit.
    """

    checkpoint: str
    inputs: tuple[str, ...]
    num_tokens: int
    seq_length: int
    dtype: str
    exits: tuple[ExitMetrics, ...]

    @property
    def final(self) -> ExitMetrics:
        """The metrics of the final exit."""
        return self.exits[-1]

    def exit(self, boundary: int) -> ExitMetrics:
        """Return the metrics of the exit after `boundary` layers.

        Raises:
            RequestError: The model has no such exit.
        """
        for metrics in self.exits:
            if metrics.boundary == boundary:
                return metrics
        known = ", ".join(str(metrics.boundary) for metrics in self.exits)
        raise RequestError(f"boundary = {boundary} has no exit. Use one of {known}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON can represent.

        It has the attributes of this class, and those of `ExitMetrics` with `perplexity` for each
        exit. An infinite perplexity is None.
        """
        values = asdict(self)
        values["inputs"] = list(self.inputs)
        values["exits"] = [
            asdict(one) | {"perplexity": one.perplexity if one.perplexity < math.inf else None}
            for one in self.exits
        ]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationResult":
        """Return the result that `to_dict` turned into these values."""
        exits = [
            {name: value for name, value in one.items() if name != "perplexity"}
            for one in values["exits"]
        ]
        converted = {
            "inputs": tuple(values["inputs"]),
            "exits": tuple(ExitMetrics(**one) for one in exits),
        }
        return cls(**{**values, **converted})

    def save_plot(self, path: str | Path) -> None:
        """Draw the loss and the agreement of the exits over their depth.

        Args:
            path: File to write, .png or .svg.

        Raises:
            RequestError: The file has another suffix.
        """
        title = f"{self.num_tokens:,} tokens"
        if self.final.loss_margin is not None:
            title += ", bars: 95 % confidence"
        panels = {
            "loss (nats per token)": [(one.loss, one.loss_margin or 0.0) for one in self.exits],
            "agreement with the final exit (%)": [
                (100 * one.agreement, 100 * (one.agreement_margin or 0.0)) for one in self.exits
            ],
        }
        save_plot(Path(path), title, [one.boundary for one in self.exits], panels)

    def __repr__(self) -> str:
        rows = [("exit after", "loss", "perplexity", "agreement", "KL to final", "confidence")]
        for one in self.exits:
            rows.append(
                (
                    f"layer {one.boundary}" + (" (final)" if one.is_final else ""),
                    _with_margin(one.loss, one.loss_margin, 4),
                    f"{one.perplexity:.4g}",
                    _with_margin(100 * one.agreement, _percent(one.agreement_margin), 1) + " %",
                    f"{one.kl_to_final:.4f}",
                    f"{one.confidence:.3f}",
                )
            )
        units = "loss in nats per token"
        if self.final.loss_margin is not None:
            units += "; ± is half of the 95 % confidence interval"
        return "\n".join(
            [
                f"{self.checkpoint}: {self.num_tokens:,} tokens of {shown_inputs(self.inputs)}",
                f"windows of {self.seq_length:,} tokens, {self.dtype}, {units}",
                "",
                *aligned(rows),
            ]
        )


def aligned(rows: Sequence[Sequence[str]], *, is_named: bool = False) -> list[str]:
    """Return rows of cells as lines with columns of equal width, aligned to the right.

    Args:
        rows: The rows, the titles first.
        is_named: Align the first column to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = str.ljust if is_named else str.rjust
    return [
        "  ".join([first(row[0], widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _with_margin(value: float, margin: float | None, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if margin is None else f"{text} ± {margin:.{digits}f}"
