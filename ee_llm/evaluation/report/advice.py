"""What to set, in plain words, with the commands that do it."""

import shlex
from dataclasses import dataclass

from ee_llm.evaluation.reliability import calibration_error
from ee_llm.evaluation.report.content import ReportContent

_MUCH = 0.1  # calibration error from which confidence is misleading
_RARELY = 0.5  # agreement below which an exit needs training


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
                "Thresholds with a guarantee for tokens that differ from the full model's come from"
                " a calibration on text that did not train the exits:",
                shlex.join(
                    [
                        *("ee-llm", "calibrate", checkpoint),
                        *_source(content),
                        *("--risk", "0.05", "--output", "policy.json"),
                    ]
                ),
            )
        ]
    known = calibration.known
    text = f"The policy file {calibration.path} has no guarantee."
    if {"risk", "delta"} <= known.keys():
        text = (
            f"With probability {1 - known['delta']:g}, at most {known['risk']:.3%} of the tokens of"
            " text like that of the calibration differ from the full model's:"
        )
    if not any(calibration.policy.thresholds):
        text += " All exits of this policy are off, so it saves nothing."
    command = ["ee-llm", "generate", "--checkpoint", checkpoint]
    return [Advice(text, shlex.join([*command, "--policy", str(calibration.path)]))]


def _of_exits(content: ReportContent) -> list[Advice]:
    found = []
    for one in content.evaluation.exits[:-1]:
        if one.agreement < _RARELY:
            found.append(
                Advice(
                    f"Exit {one.boundary} agrees with the final exit on only {one.agreement:.1%} of"
                    " tokens. Tune it for longer, or remove it: an exit that few tokens take costs"
                    " more than it saves."
                )
            )
        error = calibration_error(content.reliability.get(one.boundary, ()))
        if error is not None and error > _MUCH:
            direction = "over" if one.confidence > one.agreement else "under"
            found.append(
                Advice(
                    f"Exit {one.boundary} is {direction}confident: its mean confidence is"
                    f" {one.confidence:.2f}, and it agrees with the final exit on"
                    f" {one.agreement:.1%} of tokens. Do not read a threshold such as 0.9 as 90 %"
                    " certain. Calibrate it instead."
                )
            )
    return found


def _source(content: ReportContent) -> list[str]:
    options = content.options
    if options.data:
        return ["--data", *options.data]
    return ["--text", *map(str, options.text)]
