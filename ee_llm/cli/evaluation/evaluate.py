"""`ee-llm evaluate`: the loss of every exit on given text."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.evaluation.options import EvaluateOptions
from ee_llm.evaluation.plot import check_suffix
from ee_llm.output_files import check_writable

COMMAND = CommandHelp(
    "evaluate",
    """Measure how well every exit predicts given text: its loss and perplexity, how often its most
    probable token is that of the final exit, the divergence from the final exit's distribution,
    and its mean confidence.

    The model runs once over the text, without generating any.""",
    (
        Group("Text", "data text num_tokens", "seq_length"),
        Group("Execution", "dtype", "tensor pipeline timeout_s"),
        Group("Output", "json plot", "progress"),
    ),
    (
        "ee-llm evaluate runs/tuned --data data/validation",
        "ee-llm evaluate runs/tuned --text book.txt --num-tokens 100000 --plot exits.svg",
        "ee-llm evaluate runs/tuned --text texts/ --pipeline 2 --json result.json",
    ),
)


@dataclass(frozen=True)
class EvaluateCommandOptions(EvaluateOptions):
    """The options of `ee-llm evaluate`."""

    json: Path | None = None
    """File to write all figures to; - prints them and nothing else."""

    plot: Path | None = None
    """File to draw the loss and the agreement of the exits into: .png or .svg."""


def run_evaluate(arguments: list[str]) -> None:
    """Run `ee-llm evaluate`, on several ranks if the options say so."""
    options = parse(EvaluateCommandOptions, COMMAND, arguments, ("checkpoint",))
    if options.plot is not None:
        check_suffix(options.plot)
    for name in ("json", "plot"):
        check_writable(f"--{name}", getattr(options, name))
    from ee_llm import distributed
    from ee_llm.cli.evaluation.output import show
    from ee_llm.evaluation.evaluate import evaluate

    result = evaluate(narrowed(options, EvaluateOptions))
    if options.plot is not None and distributed.is_rank_zero():
        result.save_plot(options.plot)
    show(result, options.json, (options.plot,))
