"""`ee-llm calibrate`: thresholds of the exits for a stated risk."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.evaluation.calibration.options import CalibrateOptions
from ee_llm.evaluation.plot import check_suffix
from ee_llm.output_files import check_writable

COMMAND = CommandHelp(
    "calibrate",
    """Choose a threshold for each exit such that the quality hardly falls, with a guarantee, and
    write them to a policy file for 'ee-llm generate --policy'. Optionally train gates first.

    The text must not be the one that trained the exits, and must be like the text of later use. One
    half of it is searched for thresholds, the other half tests them.""",
    (
        Group("Guarantee", "risk delta metric", "seed"),
        Group("Confidence", "measure train_gate", "gate_tokens"),
        Group("Text", "data text task num_tokens", "seq_length"),
        Group("Execution", "dtype", "tensor pipeline timeout_s"),
        Group("Output", "output json plot", "progress"),
    ),
    (
        "ee-llm calibrate runs/tuned --data data/held-out --risk 0.02 --output policy.json",
        "ee-llm calibrate runs/tuned --data data/held-out --train-gate --output policy.json",
        "ee-llm calibrate runs/tuned --text book.txt --measure entropy --plot reliability.svg",
        "ee-llm calibrate runs/tuned --metric task --task questions.jsonl --output policy.json",
        "ee-llm generate --checkpoint runs/tuned --policy policy.json --prompt Once",
    ),
)


@dataclass(frozen=True)
class CalibrateCommandOptions(CalibrateOptions):
    """The options of `ee-llm calibrate`."""

    output: Path | None = None
    """Policy file to write: the thresholds, their guarantee, and the model that they are for."""

    json: Path | None = None
    """File to write all figures to; - prints them and nothing else."""

    plot: Path | None = None
    """File to draw the reliability diagram of every exit into, its agreement with the final exit
    over its confidence: .png or .svg."""


def run_calibrate(arguments: list[str]) -> None:
    """Run `ee-llm calibrate`, on several ranks if the options say so."""
    options = parse(CalibrateCommandOptions, COMMAND, arguments, ("checkpoint",))
    if options.plot is not None:
        check_suffix(options.plot)
    for name in ("output", "json", "plot"):
        check_writable(f"--{name}", getattr(options, name))
    from ee_llm import distributed
    from ee_llm.cli.evaluation.output import show
    from ee_llm.evaluation.calibration.calibrate import calibrate

    result = calibrate(narrowed(options, CalibrateOptions))
    if options.output is not None and distributed.is_rank_zero():
        result.save(options.output)
    if options.plot is not None and distributed.is_rank_zero():
        result.save_plot(options.plot)
    show(result, options.json, (options.output, options.plot))
