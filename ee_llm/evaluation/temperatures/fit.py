"""Fit the temperatures of a checkpoint's exits on held-out text."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.config import Config
from ee_llm.errors import DataError, RequestError
from ee_llm.evaluation.measure import COLUMNS
from ee_llm.evaluation.options import TextOptions, check_exits_exist, shown_inputs
from ee_llm.evaluation.reliability import Reliability, calibration_error
from ee_llm.evaluation.row_statistics import Gather
from ee_llm.evaluation.temperatures.logits import SCALES, scaled_normalizers
from ee_llm.evaluation.temperatures.minimum import ScaledTokens
from ee_llm.evaluation.text_pass import run_pass

MIN_TOKENS = 1024
"""Least number of tokens that fit temperatures."""

_DIGITS = 5  # significant digits of a temperature


@dataclass(frozen=True)
class FittedExit:
    """The temperature of an exit, and what it changes on the text that fitted it.

    Attributes:
        boundary: Boundary of the exit.
        old, new: The temperature before and after.
        is_bracketed: Whether the search found a minimum; otherwise `new` is at the end of its
            range, and the best temperature lies beyond.
        agreement: Share of tokens for which the exit's most probable token is that of the final
            exit. The temperature does not change it.
        loss_before, loss_after: Mean cross entropy of the final exit's most probable token, in
            nats.
        error_before, error_after: Expected calibration error of the greatest probability.
    """

    boundary: int
    old: float
    new: float
    is_bracketed: bool
    agreement: float
    loss_before: float
    loss_after: float
    error_before: float
    error_after: float


@dataclass(frozen=True, repr=False)
class FittedTemperatures:
    """The fitted temperatures of all early exits; `repr` returns them as a table.

    Attributes:
        exits: The exits in order of depth.
        inputs: Prefixes of prepared data, or text files.
        num_tokens: Number of tokens that fitted them.
        seq_length: Length of a window in tokens.
        dtype: Name of the dtype of the computation.
    """

    exits: tuple[FittedExit, ...]
    inputs: tuple[str, ...]
    num_tokens: int
    seq_length: int
    dtype: str

    @property
    def temperatures(self) -> Mapping[int, float]:
        """The new temperatures by boundary."""
        return {one.boundary: one.new for one in self.exits}

    @property
    def warnings(self) -> list[str]:
        """A message about each exit whose best temperature was not found."""
        return [_warning(one) for one in self.exits if not one.is_bracketed]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as values that JSON can represent."""
        return asdict(self)

    def __repr__(self) -> str:
        lines = [
            f"temperatures fitted to {self.num_tokens:,} tokens of {shown_inputs(self.inputs)}",
            f"windows of {self.seq_length:,} tokens, {self.dtype}, cross entropy in nats",
            "",
            "            temperature       cross entropy     calibration error",
            "exit after  old      new      before   after    before   after     agreement",
        ]
        for one in self.exits:
            lines.append(
                f"layer {one.boundary:<4}  {one.old:<7.4g}  {one.new:<7.4g}"
                f"  {one.loss_before:<7.4f}  {one.loss_after:<7.4f}"
                f"  {one.error_before:<7.4f}  {one.error_after:<8.4f}  {one.agreement:.1%}"
            )
        return "\n".join(lines)


def fit_temperatures(options: TextOptions) -> FittedTemperatures | None:
    """Return the temperatures that make exits predict the final exit's most probable token best.

    The temperature T of an exit minimizes the mean cross entropy between the softmax of its logits
    over T and the final exit's most probable token (temperature scaling: Guo et al., On calibration
    of modern neural networks, 2017, arXiv 1706.04599, section 4.2).

    Returns None without running anything if tensor x pipeline > 1 and no launcher has started that
    many ranks: the caller then does.

    Raises:
        UserError: The options, the text or the checkpoint is not valid, or the text is too short.
        RunError: The loss of an exit is not finite, or a rank was lost.
    """
    if options.num_tokens is not None and 1 <= options.num_tokens < MIN_TOKENS:
        raise RequestError(
            f"num_tokens = {options.num_tokens} is too small to fit temperatures. Use"
            f" {MIN_TOKENS:,} or more."
        )
    done = run_pass(
        options,
        "fitting temperatures",
        lambda config: TemperatureCollector(config, options.checkpoint),
    )
    if done is None:
        return None
    if done.num_tokens < MIN_TOKENS:
        raise DataError(
            f"the text has {done.num_tokens:,} tokens, too few to fit temperatures. Give at least"
            f" {MIN_TOKENS:,}."
        )
    exits = tuple(FittedExit(**one) for one in done.found)
    return FittedTemperatures(exits, done.inputs, done.num_tokens, done.seq_length, done.dtype)


class TemperatureCollector:
    """Collects the normalizers of every early exit, and fits; see `measure.LogitCollector`."""

    def __init__(self, config: Config, checkpoint: Path) -> None:
        """Raise RequestError for a model without early exits."""
        exits = config.exits
        check_exits_exist(config, checkpoint, "fit temperatures of")
        self._old = dict(zip(exits.boundaries, exits.temperatures, strict=True))
        self._gaps: dict[int, list[Tensor]] = {b: [] for b in self._old}
        self._normalizers: dict[int, list[Tensor]] = {b: [] for b in self._old}
        self._agreement: dict[int, list[Tensor]] = {b: [] for b in self._old}

    def add_logits(
        self, boundary: int, logits: Tensor, final_top: Tensor, first_id: int, gather: Gather
    ) -> None:
        gaps, normalizers = scaled_normalizers(logits, final_top, first_id, gather)
        self._gaps[boundary].append(gaps.double().cpu())
        self._normalizers[boundary].append(normalizers.float().cpu())  # There may be many tokens.

    def add(self, columns: dict[int, Tensor]) -> None:
        for boundary, found in self._agreement.items():
            found.append(columns[boundary][COLUMNS.index("agreement")])

    def check(self, num_windows: int) -> None:
        pass  # The number of tokens counts.

    def result(self) -> list[dict[str, Any]]:
        return [asdict(self._fitted(boundary)) for boundary in self._old]

    def _fitted(self, boundary: int) -> FittedExit:
        tokens = ScaledTokens(
            torch.cat(self._gaps[boundary]), torch.cat(self._normalizers[boundary], dim=1)
        )
        agreement = torch.cat(self._agreement[boundary])
        minimum, old = tokens.minimum(), self._old[boundary]
        new = float(f"{old / minimum.scale:.{_DIGITS}g}")
        scale = old / new  # of the rounded temperature

        def error(scale: float) -> float:
            reliability = Reliability()
            reliability.add_tokens(boundary, tokens.confidence(scale), agreement)
            return calibration_error(reliability.bins()[boundary]) or 0.0

        return FittedExit(
            boundary,
            old,
            new,
            minimum.is_bracketed,
            float(agreement.mean()),
            tokens.loss(1.0),
            tokens.loss(scale),
            error(1.0),
            error(scale),
        )


def _warning(one: FittedExit) -> str:
    """Return what to do about an exit whose best temperature is out of the range of the search."""
    factor, end = one.new / one.old, max(SCALES)
    if math.log(factor) > 0:
        return (
            f"exit after layer {one.boundary}: the best temperature is above {end:g} times the old"
            f" one, where the search ends. The exit agrees with the final exit for only"
            f" {one.agreement:.1%} of tokens: tune it before you use it, or remove it."
        )
    return (
        f"exit after layer {one.boundary}: the best temperature is below 1/{end:g} of the old one,"
        f" where the search ends. The exit agrees with the final exit for {one.agreement:.1%} of"
        " tokens. Use more text, or fit the new checkpoint again."
    )
