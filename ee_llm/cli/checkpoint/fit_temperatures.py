"""`ee-llm checkpoint fit-temperatures`: write a checkpoint whose exits have fitted temperatures."""

from dataclasses import dataclass, field
from pathlib import Path

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.evaluation.options import TextOptions
from ee_llm.launch.local import launch

COMMAND = CommandHelp(
    "checkpoint fit-temperatures",
    """Fit the temperature of each exit to a text, such that its confidence is the probability to
    agree with the final exit. The tensors, including the optimizer's state, stay the same bit for
    bit.

    The text must not be the one that trained the exits, and must be like the text of later use.""",
    (
        Group("Text", "data text num_tokens", "seq_length"),
        Group("Execution", "dtype", "tensor pipeline timeout_s"),
        Group("Output", "json", "progress"),
    ),
    (
        "ee-llm checkpoint fit-temperatures runs/tuned --data data/held-out --output runs/scaled",
        "ee-llm checkpoint fit-temperatures runs/tuned --text book.txt --num-tokens 50000 "
        "--output runs/scaled",
        "ee-llm calibrate runs/scaled --data data/more --plot reliability.svg",
    ),
)

_NOTE = (
    "The model's fingerprint has changed. Run 'ee-llm calibrate' again: policies and gates of the"
    " old checkpoint are not valid for the new one."
)


@dataclass(frozen=True)
class FitTemperaturesOptions(TextOptions):
    """The options of `ee-llm checkpoint fit-temperatures`."""

    output: Path = field(kw_only=True)
    """Write the result to this new run directory."""

    json: bool = False
    """Print one JSON object and nothing else."""


def run_fit_temperatures(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint fit-temperatures`, on several ranks if the options say so."""
    options = parse(FitTemperaturesOptions, COMMAND, arguments, ("checkpoint",))
    from ee_llm import distributed
    from ee_llm.checkpoint import directory
    from ee_llm.checkpoint.format.quantized import refuse_quantized
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.temperatures import with_temperatures
    from ee_llm.cli.checkpoint.rewriting import write
    from ee_llm.evaluation.temperatures.fit import fit_temperatures

    reader = TensorReader(options.checkpoint)
    refuse_quantized(reader)  # before the model runs
    directory.refuse_used(options.output)
    fitted = fit_temperatures(narrowed(options, TextOptions))
    if fitted is None:
        launch(options.tensor * options.pipeline, [*COMMAND.command.split(), *arguments])
        return
    if not distributed.is_rank_zero():
        return
    rewrite = with_temperatures(reader, fitted.temperatures)
    rewrite.notes += [*fitted.warnings, _NOTE]
    if not options.json:
        print(f"{fitted}\n")
    write(rewrite, options.output, as_json=options.json, facts=fitted.to_dict())
