"""The result of a calibration: an exit policy and what is known about it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.evaluation.calibration.options import Metric
from ee_llm.evaluation.options import shown_inputs
from ee_llm.evaluation.plot import check_suffix, save_figure
from ee_llm.evaluation.record import check_record
from ee_llm.evaluation.reliability import ReliabilityBin
from ee_llm.evaluation.reliability_plot import draw_reliability
from ee_llm.inference.choices import Measure
from ee_llm.inference.exits.policy import ExitPolicy

PROMISES: dict[Metric, str] = {
    "agreement": "at most {:.3%} of tokens disagree with the final exit",
    "perplexity": "the perplexity rises by at most {:.3%}",
    "task": "at most {:.3%} of the answers that the final exit gives right are lost",
}
"""What a calibration guarantees, by its metric; to be formatted with the risk."""

_FOUND: dict[Metric, str] = {
    "agreement": "{:.3%} disagree",
    "perplexity": "the perplexity rises by {:.3%}",
    "task": "{:.3%} of right answers are lost",
}


@dataclass(frozen=True, repr=False)
class CalibrationResult:
    """Thresholds of the exits and the risk that they keep; `repr` returns them as a table.

    With a probability of at least 1 - delta over the choice of the text, the risk is at most
    `risk`. For the metric "agreement", it is the expected share of tokens of a window whose exit
    disagrees with the final exit. For "perplexity", it is the relative increase of the perplexity
    to which the expected increase of a window's loss amounts. A window counts its mean increase in
    nats per token, limited to between 0 and 1, and all windows count equally. For "task", it is the
    share of lost answers among the questions that the final exit answers right. The guarantee holds
    for text from the same source as the text of the calibration, if its windows are independent.

    Attributes:
        checkpoint: Directory of the checkpoint.
        fingerprint: Fingerprint of its model, 16 hexadecimal digits.
        inputs: Prefixes of prepared data, or text files.
        text_digest: Digest of the token ids of the text, 16 hexadecimal digits.
        num_layers: Number of layers of the model.
        boundaries: Boundaries of the early exits.
        thresholds: Threshold of each early exit; None is off.
        measure: Measure of confidence.
        metric: What the risk is about.
        risk: Greatest risk.
        delta: Greatest probability that the risk is exceeded.
        loss: Mean loss of the windows that tested the thresholds, an estimate of the risk: a share,
            or nats per token for "perplexity".
        p_value: P-value of the hypothesis that the risk is exceeded; None with all exits off.
        shares: Share of tokens that takes each exit, the final one last.
        heads: Mean number of exit heads that a token computes.
        cost: Mean cost of a token in layers, with the heads that it computes.
        full_cost: Cost of a token without early exits.
        head_cost: Cost of an exit's head, in layers: the ratio of their weights.
        least_final_share: Share of tokens that must take the final exit even with a perfect measure
            of confidence; None for other metrics than "agreement".
        num_windows: Number of windows that tested the thresholds.
        num_tokens: Number of their tokens.
        seq_length: Length of a window in tokens.
        dtype: Name of the dtype of the computation.
        calibration_errors: Expected calibration error of each early exit, between 0 and 1: the mean
            gap between its confidence and its agreement with the final exit, over all tokens that
            calibrated, in bins of the confidence (arXiv 1706.04599).
        reliability: These bins of each early exit, least confident first.
        final_accuracy: Share of the questions of a task that the final exit answers right. The
            others do not count.
        gates: Of each gate that was trained: the boundary of its exit, the share of tokens for
            which the exit agrees with the final exit, and the area under the ROC curve with which
            the gate predicts that, on tokens that did not train it.
    """

    checkpoint: str
    fingerprint: str
    inputs: tuple[str, ...]
    text_digest: str
    num_layers: int
    boundaries: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    measure: Measure
    metric: Metric
    risk: float
    delta: float
    loss: float
    p_value: float | None
    shares: tuple[float, ...]
    heads: float
    cost: float
    full_cost: float
    head_cost: float
    least_final_share: float | None
    num_windows: int
    num_tokens: int
    seq_length: int
    dtype: str
    calibration_errors: tuple[float, ...]
    reliability: tuple[tuple[ReliabilityBin, ...], ...]
    final_accuracy: float | None = None
    gates: tuple[dict[str, float | None], ...] = ()

    @property
    def policy(self) -> ExitPolicy:
        """The exit policy, for `LLM` and `LLM.generate`."""
        return ExitPolicy(self.boundaries, self.thresholds, self.measure)

    @property
    def saving(self) -> float:
        """Share of the layers and heads that the early exits save, at best."""
        return 1 - self.cost / self.full_cost

    @property
    def mean_depth(self) -> float:
        """Mean number of layers of a token."""
        depths = (*self.boundaries, self.num_layers)
        return sum(share * depth for share, depth in zip(self.shares, depths, strict=True))

    @property
    def _num_calibrated(self) -> int:
        """Number of tokens of both halves of the text, or of the answers that count."""
        return sum(one.num_tokens for one in self.reliability[0])

    @property
    def _shown_loss(self) -> float:
        return math.expm1(self.loss) if self.metric == "perplexity" else self.loss

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as values that JSON can represent."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CalibrationResult":
        """Return the result that `to_dict` turned into these values.

        Raises:
            RequestError: A value is missing, or is not what a calibration writes. The error names
                it.
        """
        check_record(cls, values)
        if not len(values["boundaries"]) == len(values["thresholds"]) == len(values["shares"]) - 1:
            raise RequestError(
                f"shares = {list(values['shares'])} and thresholds = {list(values['thresholds'])}"
                f" do not fit exits at {list(values['boundaries'])}"
            )
        lists = ("inputs", "boundaries", "thresholds", "shares", "calibration_errors", "gates")
        converted: dict[str, Any] = {name: tuple(values[name]) for name in lists}
        converted["reliability"] = tuple(
            tuple(ReliabilityBin(**one) for one in bins) for bins in values["reliability"]
        )
        return cls(**{**values, **converted})

    def save(self, path: str | Path) -> None:
        """Write a policy file, which `exits` and `--policy` accept for this model.

        It has all attributes but `reliability`, which is many numbers.

        Args:
            path: The JSON file to write.
        """
        omitted = ("measure", "thresholds", "boundaries", "reliability")
        known = {name: value for name, value in self.to_dict().items() if name not in omitted}
        self.policy.save(path, known)

    def save_plot(self, path: str | Path) -> None:
        """Draw the reliability diagram of every exit.

        Args:
            path: File to write, .png or .svg.

        Raises:
            RequestError: The file has another suffix.
        """
        check_suffix(Path(path))
        bins = dict(zip(self.boundaries, self.reliability, strict=True))
        title = f"{self._num_calibrated:,} tokens, {self.measure}"
        save_figure(draw_reliability(bins, title=title), Path(path))

    def __repr__(self) -> str:
        lines = [
            f"{self.checkpoint}: thresholds of {self.measure}, calibrated on"
            f" {shown_inputs(self.inputs)}",
            f"risk {self.risk:g}: with probability {1 - self.delta:g},"
            f" {PROMISES[self.metric].format(self.risk)}",
            "",
            "exit after  threshold  tokens  calibration error",
        ]
        errors = self.calibration_errors
        rows = zip(self.boundaries, self.thresholds, self.shares, errors, strict=False)
        for boundary, threshold, share, error in rows:
            shown = "off" if threshold is None else f"{threshold:.4f}"
            lines.append(f"layer {boundary:<4}  {shown:>9}  {share:6.1%}  {error:17.3f}")
        lines.append(f"layer {self.num_layers:<4}  {'final':>9}  {self.shares[-1]:6.1%}")
        lines += [
            "",
            f"tested on {self.num_tokens:,} tokens in {self.num_windows:,}"
            f" {'questions' if self.metric == 'task' else 'windows'}:"
            f" {_FOUND[self.metric].format(self._shown_loss)}",
            f"mean depth {self.mean_depth:.2f} of {self.num_layers} layers; with {self.heads:.2f}"
            f" heads of {self.head_cost:.2f} layers, a token costs {self.cost:.2f} of"
            f" {self.full_cost:.2f} layers: {self.saving:.1%} less",
        ]
        lines.append(
            "calibration error: the mean gap between confidence and agreement with the final exit,"
            f" over all {self._num_calibrated:,} tokens"
        )
        if self.least_final_share is not None:
            lines.append(
                f"even with a perfect measure of confidence, {self.least_final_share:.1%} of tokens"
                " need the final exit"
            )
        if self.final_accuracy is not None:
            lines.append(
                f"the final exit answers {self.final_accuracy:.1%} of the questions right; only"
                " these count"
            )
        for gate in self.gates:
            auc = "not defined" if gate["auc"] is None else f"{gate['auc']:.3f}"
            lines.append(
                f"gate after layer {gate['boundary']}: the exit agrees for {gate['agreement']:.1%}"
                f" of tokens; area under the ROC curve of the gate: {auc}"
            )
        if self.p_value is None:
            lines.append("no thresholds save anything at this risk, so all exits are off")
        return "\n".join(lines)
