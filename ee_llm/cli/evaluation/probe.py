"""`ee-llm probe`: the boundaries where exits belong."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.evaluation.plot import check_suffix
from ee_llm.evaluation.probe.options import ProbeOptions
from ee_llm.output_files import check_writable

COMMAND = CommandHelp(
    "probe",
    """Find the layers after which exits belong. The command fits a least-squares exit after every
    layer to one part of a text. On another part, it measures how often each of them agrees with
    the final exit, and which exits would save most.

    The checkpoint is not changed, and exits that it has are ignored.""",
    (
        Group("Text", "data text fit_data num_fit_tokens num_tokens", "seq_length"),
        Group("Exits", "num_exits risk", "boundaries costs"),
        Group("Output", "json plot", "progress"),
    ),
    (
        "ee-llm probe runs/llama --data data/corpus",
        "ee-llm probe runs/llama --text book.txt --num-exits 2 --risk 0.02 --plot probe.svg",
        "ee-llm probe runs/llama --data data/validation --fit-data data/corpus --json probe.json",
    ),
)


@dataclass(frozen=True)
class ProbeCommandOptions(ProbeOptions):
    """The options of `ee-llm probe`."""

    json: Path | None = None
    """File to write all figures to; - prints them and nothing else."""

    plot: Path | None = None
    """File to draw the agreement after each layer into: .png or .svg."""


def run_probe(arguments: list[str]) -> None:
    """Run `ee-llm probe`."""
    options = parse(ProbeCommandOptions, COMMAND, arguments, ("checkpoint",))
    if options.plot is not None:
        check_suffix(options.plot)
    for name in ("json", "plot"):
        check_writable(f"--{name}", getattr(options, name))
    from ee_llm.cli.evaluation.output import show
    from ee_llm.evaluation.probe.probe import probe

    result = probe(narrowed(options, ProbeOptions))
    if options.plot is not None:
        result.save_plot(options.plot)
    show(result, options.json, (options.plot,))
