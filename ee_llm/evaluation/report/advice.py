"""What to set, in plain words, with the commands that do it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ee_llm.evaluation.calibration.options import Metric
from ee_llm.evaluation.calibration.result import PROMISES
from ee_llm.evaluation.reliability import calibration_error
from ee_llm.evaluation.report.content import ReportContent
from ee_llm.evaluation.result import ExitMetrics

# Tokens from which exits are judged. With n tokens in 15 bins, the calibration error of a perfect
# confidence is at most about 0.4 sqrt(15 / n), which is half of _MUCH for 1,000 tokens.
_ENOUGH = 1000
_MUCH = 0.1  # calibration error from which confidence is misleading
_RARELY = 0.5  # agreement below which an exit may need training
_FEW = 0.01  # share of tokens below which an exit does not pay

_OF_TEXT = (
    "over windows of text from the same source, if every token is predicted from the true tokens"
    " before it; generated text is not covered"
)
_SCOPES: dict[Metric, str] = {
    "agreement": _OF_TEXT,
    "perplexity": _OF_TEXT,
    "task": "over questions from the same source",
}


@dataclass(frozen=True)
class Advice:
    """A paragraph and a command that it recommends, or "" for none."""

    text: str
    command: str = ""


def advise(content: ReportContent) -> list[Advice]:
    """Return what to set for this model, and what to measure first if that is not known."""
    return [*_of_sweep(content), *_of_calibration(content), *_of_exits(content)]


def _of_sweep(content: ReportContent) -> list[Advice]:
    options, sweep = content.options, content.sweep
    if sweep is None:
        return [
            Advice(
                "The speed of this model with its exits has not been measured. Measure it on the"
                " machine that will run it, and add the result to this report with --sweep:",
                shlex.join(
                    [
                        *("ee-llm", "sweep", str(options.checkpoint)),
                        *_source(content),
                        *("--json", "sweep.json"),
                    ]
                ),
            )
        ]
    *lines, _ = sweep.advice()
    return [Advice(" ".join(lines), sweep.command())]


def _of_calibration(content: ReportContent) -> list[Advice]:
    calibration, checkpoint = content.calibration, str(content.options.checkpoint)
    if calibration is None:
        return [
            Advice(
                "Thresholds with a guarantee, such as that few tokens disagree with the final exit,"
                " come from a calibration on text that did not train the exits:",
                shlex.join(
                    [
                        *("ee-llm", "calibrate", checkpoint),
                        *_source(content),
                        *("--risk", "0.05", "--output", "policy.json"),
                    ]
                ),
            )
        ]
    result = calibration.result
    if result is None:
        text = f"The policy file {calibration.path} has no guarantee."
    else:
        promise = PROMISES[result.metric].format(result.risk)
        text = (
            f"With probability {1 - result.delta:g} over the choice of the text of the calibration,"
            f" {promise}, on average {_SCOPES[result.metric]}."
        )
    if not any(calibration.policy.thresholds):
        text += " All exits of this policy are off, so it saves nothing."
    elif content.sweep is not None:
        text += (
            " Use it where this guarantee matters more than the measured speed above. To see its"
            " own speed, measure it with 'ee-llm sweep --policy'."
        )
    command = ["ee-llm", "generate", "--checkpoint", checkpoint]
    return [Advice(text, shlex.join([*command, "--policy", str(calibration.path)]))]


def _of_exits(content: ReportContent) -> list[Advice]:
    found = _of_shares(content)
    num_tokens = content.evaluation.num_tokens
    if num_tokens < _ENOUGH:
        text = (
            f"The text has {num_tokens:,} tokens, too few to judge the exits and their confidence."
            f" Use {_ENOUGH:,} or more."
        )
        return [*found, Advice(text)]
    for one in content.evaluation.exits[:-1]:
        if one.agreement < _RARELY:
            found.append(
                Advice(
                    f"Exit {one.boundary} agrees with the final exit on only {one.agreement:.1%} of"
                    " tokens. Tuning it for longer may help. Whether it saves time depends on the"
                    " tokens that it decides under a policy, which a sweep or a calibration"
                    " measures."
                )
            )
        error = calibration_error(content.reliability.get(one.boundary, ()))
        if error is not None and error > _MUCH:
            found.append(
                Advice(
                    f"The confidence of exit {one.boundary} is {_direction(one, error)}: on"
                    f" average, it is {one.confidence:.2f}, and the exit agrees with the final exit"
                    f" on {one.agreement:.1%} of tokens (ECE {error:.2f}). Do not read a threshold"
                    " such as 0.9 as 90 % certain. 'ee-llm checkpoint fit-temperatures' corrects"
                    " it; calibrated thresholds need no correction."
                )
            )
    return found


def _direction(metrics: ExitMetrics, error: float) -> str:
    """Return in which direction the confidence is wrong, if most of its error is in one."""
    gap = metrics.confidence - metrics.agreement
    if abs(gap) <= error / 2:
        return "misleading, too high for some tokens and too low for others"
    return "too high" if gap > 0 else "too low"


def _of_shares(content: ReportContent) -> list[Advice]:
    """Return advice on exits that decide few tokens under all policies that are recommended."""
    measured: dict[str, Sequence[float]] = {}
    calibration, sweep = content.calibration, content.sweep
    calibrated = None if calibration is None else calibration.result
    if calibrated is not None and any(calibrated.thresholds):
        measured["the calibrated policy"] = calibrated.shares
    if sweep is not None and any(sweep.recommended.thresholds):
        measured["the recommended point of the sweep"] = sweep.recommended.shares
    if not measured:
        return []
    names = " and ".join(measured)
    shares = [max(of_exit) for of_exit in zip(*measured.values(), strict=True)]
    return [
        Advice(
            f"Exit {boundary} decides {share:.1%} of tokens under {names}. An exit that few tokens"
            " take saves little and costs the time of its head, or only memory if it is off."
            " If other policies do not use it either, remove it with 'ee-llm checkpoint"
            " remove-exits', or tune it for longer."
        )
        for boundary, share in zip(content.config.exits.boundaries, shares, strict=False)
        if share < _FEW
    ]


def _source(content: ReportContent) -> list[str]:
    options = content.options
    if options.data:
        return ["--data", *options.data]
    return ["--text", *map(str, options.text)]
