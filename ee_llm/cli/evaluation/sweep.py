"""`ee-llm sweep`: the speed and the quality of exit policies and drafts."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.evaluation.plot import check_suffix
from ee_llm.evaluation.sweep.options import SweepOptions
from ee_llm.output_files import check_writable

COMMAND = CommandHelp(
    "sweep",
    """Generate text with many exit policies and drafts, compare each with the full model in speed
    and in tokens, and recommend the fastest one that is good enough.

    Each set of exits is measured with each threshold, and each exit as a draft of several lengths.
    The speed-up is that of generation on this machine, in turns with the full model. The best ones
    are tested against it in more runs, and recommended only if they are reliably faster.""",
    (
        Group(
            "Prompts",
            "prompts data text num_prompts max_tokens",
            "prompt_length chat_template ignore_eos",
        ),
        Group("Thresholds", "exits thresholds policy", "strategy measure families"),
        Group("Drafts", "draft_exits draft_lengths"),
        Group("Measurement", "min_agreement batch_size rounds"),
        Group("Execution", "dtype", "attention cuda_graphs compile tensor pipeline timeout_s"),
        Group("Output", "csv json plot", "progress"),
    ),
    (
        "ee-llm sweep runs/tuned --prompts prompts.jsonl --plot front.svg --json sweep.json",
        "ee-llm sweep runs/tuned --data data/held-out --exits 8 8+16 --thresholds 0.8 0.9",
        "ee-llm sweep runs/tuned --text book.txt --policy policy.json --batch-size 8",
    ),
)


@dataclass(frozen=True)
class SweepCommandOptions(SweepOptions):
    """The options of `ee-llm sweep`."""

    csv: Path | None = None
    """File to write a row for each point to."""

    json: Path | None = None
    """File to write all figures to; - prints them and nothing else."""

    plot: Path | None = None
    """File to draw agreement over speed-up into: .png or .svg."""


def run_sweep(arguments: list[str]) -> None:
    """Run `ee-llm sweep`."""
    options = parse(SweepCommandOptions, COMMAND, arguments, ("checkpoint",))
    if options.plot is not None:
        check_suffix(options.plot)
    for name in ("csv", "json", "plot"):
        check_writable(f"--{name}", getattr(options, name))
    from ee_llm.cli.evaluation.output import print_result, write_json
    from ee_llm.evaluation.sweep.sweep import sweep

    result = sweep(narrowed(options, SweepOptions))
    # The picture is last: if it fails, the figures of a long run are kept.
    write_json(result, options.json)
    if options.csv is not None:
        result.save_csv(options.csv)
    if options.plot is not None:
        result.save_plot(options.plot)
    print_result(result, options.json, (options.csv, options.plot))
