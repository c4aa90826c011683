"""`ee-llm convert`: convert models from Hugging Face and Megatron-LM, and back."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import narrowed, parse
from ee_llm.conversion.options import ConvertOptions

if TYPE_CHECKING:
    from ee_llm.conversion.convert import ConversionResult

COMMAND = CommandHelp(
    "convert",
    """Convert a model of Hugging Face or Megatron-LM to an ee-llm checkpoint, or a checkpoint back.

    The conversion runs on the CPU, tensor by tensor. If it fails, it leaves no partial result.""",
    (
        Group("Result", "to", "max_shard_gb"),
        Group("Exits to add to a converted model", "exits head", "exit_output"),
        Group("Parts of an ee-llm checkpoint", "dense truncate_at"),
        Group("Source", "tokenizer revision", "dtype strict"),
        Group("Check and output", "check json", "text"),
    ),
    (
        "ee-llm convert models/llama --output runs/llama --exits 8 16",
        "ee-llm convert HuggingFaceTB/SmolLM2-135M-Instruct --output runs/smol --check",
        "ee-llm convert runs/tuned --to hf --output models/tuned",
    ),
)


@dataclass(frozen=True)
class ConvertCommandOptions(ConvertOptions):
    """The options of `ee-llm convert`."""

    json: bool = False
    """Print one JSON object and nothing else."""


def run_convert(arguments: list[str]) -> None:
    """Run `ee-llm convert`; raises ConversionError and CheckpointError."""
    options = parse(ConvertCommandOptions, COMMAND, arguments, ("source",))
    from ee_llm.conversion.convert import convert

    # Libraries log to standard output, as DeepSpeed does when transformers imports it.
    with redirect_stdout(sys.stderr):
        result = convert(narrowed(options, ConvertOptions), progress=not options.json)
    if options.json:
        print(json.dumps(_as_json(result)))
    else:
        _show(result)


def _as_json(result: "ConversionResult") -> dict[str, object]:
    record: dict[str, object] = {
        "output": str(result.output),
        "notes": list(result.notes),
        "tensors": result.num_tensors,
        "bytes": result.num_bytes,
        "dtypes": list(result.dtypes),
    }
    if result.differences:
        record["differences"] = [difference._asdict() for difference in result.differences]
    return record


def _show(result: "ConversionResult") -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    console.print(escape(str(result)))
    for boundary, absolute, relative in result.differences:
        console.print(
            f"boundary {boundary}: logits differ by at most {absolute:.1e} ({relative:.1e} of the "
            "largest)"
        )
