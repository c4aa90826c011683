"""`ee-llm report`: what is known about a model's exits, as one HTML page."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.evaluation.report.options import ReportOptions
from ee_llm.output_files import check_writable

COMMAND = CommandHelp(
    "report",
    """Write one HTML page about the exits of a model: how well each predicts given text, whether
    its confidence can be trusted, the speed and agreement of a sweep, samples, and what to set.

    The page has no scripts and loads nothing, so that it can be sent and read anywhere.""",
    (
        Group("Text", "data text num_tokens", "seq_length"),
        Group("Results to include", "sweep calibration"),
        Group("Samples", "num_samples", "max_tokens"),
        Group("Execution", "dtype"),
        Group("Output", "output", "progress"),
    ),
    (
        "ee-llm report runs/tuned --data data/held-out",
        "ee-llm report runs/tuned --text book.txt --sweep sweep.json --calibration policy.json",
    ),
)


@dataclass(frozen=True)
class ReportCommandOptions(ReportOptions):
    """The options of `ee-llm report`."""

    output: Path = Path("report.html")
    """HTML file to write."""


def run_report(arguments: list[str]) -> None:
    """Run `ee-llm report`."""
    options = parse(ReportCommandOptions, COMMAND, arguments, ("checkpoint",))
    check_writable("--output", options.output)
    from ee_llm.evaluation.report.report import report

    report(narrowed(options, ReportOptions), options.output)
    print(f"wrote {options.output}")
