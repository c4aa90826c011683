"""`ee-llm checkpoint`: show a checkpoint, or write a changed copy of it."""

import json
from typing import Any

from ee_llm.cli.arguments.help import CommandHelp, Group
from ee_llm.cli.arguments.parsing import parse
from ee_llm.cli.checkpoint.options import (
    AverageOptions,
    InfoOptions,
    MoveExitsOptions,
    RemoveExitsOptions,
    ReshardOptions,
)
from ee_llm.errors import CheckpointError

_CHECKPOINT = ("checkpoint",)
_OUTPUT = Group("Output", "json")

INFO = CommandHelp(
    "checkpoint info",
    "Show the model, the exits, the training progress and the sizes of a checkpoint.",
    (Group("Options", "tensors verify json"),),
    ("ee-llm checkpoint info runs/first", "ee-llm checkpoint info runs/first --verify"),
)
RESHARD = CommandHelp(
    "checkpoint reshard",
    """Rewrite the blocks of a checkpoint, including the optimizer's state, for another parallel
    layout.

    Any layout can resume from any checkpoint without this command, because a checkpoint stores
    unsharded tensors. It speeds up the start of a large run from a checkpoint that few ranks or a
    conversion have written, because otherwise each rank reads whole tensors to take its columns.
    Afterwards, each rank reads its own blocks from its own file, and the configuration has the new
    layout.""",
    (Group("Layout", "tensor pipeline virtual layer_split"), _OUTPUT),
    ("ee-llm checkpoint reshard runs/llama --tensor 4 --pipeline 2 --output runs/llama-4x2",),
)
MOVE_EXITS = CommandHelp(
    "checkpoint move-exits",
    """Place all exits of a checkpoint before or after the boundaries of pipeline stages.

    The tensors and the function of the model do not change, but the time and memory of the stages
    do.""",
    (_OUTPUT,),
    ("ee-llm checkpoint move-exits runs/first --placement pre --output runs/pre",),
)
REMOVE_EXITS = CommandHelp(
    "checkpoint remove-exits",
    "Remove exits from a checkpoint, together with their optimizer state. All other tensors stay.",
    (_OUTPUT,),
    ("ee-llm checkpoint remove-exits runs/first --exits 2 --output runs/fewer",),
)
AVERAGE = CommandHelp(
    "checkpoint average",
    "Average the weights of several checkpoints of one run. The result has no optimizer state.",
    (Group("Checkpoints", "last"), _OUTPUT),
    (
        "ee-llm checkpoint average runs/first --last 3 --output runs/mean",
        "ee-llm checkpoint average runs/first/checkpoints/step-0000[12]00 --output runs/mean",
    ),
)


def run_info(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint info`; raises CheckpointError for a damaged checkpoint."""
    options = parse(InfoOptions, INFO, arguments, _CHECKPOINT)
    from rich.console import Console

    from ee_llm.checkpoint.integrity import size_of, verify
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery import info
    from ee_llm.cli.checkpoint.rewriting import progress
    from ee_llm.cli.checkpoint.show import show

    facts: dict[str, Any]
    report = None
    if options.verify:
        size = size_of(options.checkpoint)
        with progress("verifying", size, is_quiet=options.json) as advance:
            report = verify(options.checkpoint, advance)
        if report.problems:
            if options.json:
                facts = {"path": str(report.path), "verification": info.verification(report)}
                print(json.dumps(facts))
            raise CheckpointError("; ".join(report.problems))
    reader = TensorReader(options.checkpoint)
    facts = info.describe(reader)
    if report is not None:
        facts["verification"] = info.verification(report)
    if options.tensors:
        facts["all_tensors"] = info.tensors_of(reader)
    if options.json:
        print(json.dumps(facts))
    else:
        show(facts, Console(soft_wrap=True, highlight=False))


def run_reshard(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint reshard`."""
    options = parse(ReshardOptions, RESHARD, arguments, _CHECKPOINT)
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.reshard import Layout, resharded
    from ee_llm.cli.checkpoint.rewriting import write

    layout = Layout(options.tensor, options.pipeline, options.virtual, options.layer_split)
    rewrite = resharded(TensorReader(options.checkpoint), layout)
    write(rewrite, options.output, as_json=options.json)


def run_move_exits(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint move-exits`."""
    options = parse(MoveExitsOptions, MOVE_EXITS, arguments, _CHECKPOINT)
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import moved
    from ee_llm.cli.checkpoint.rewriting import write

    rewrite = moved(TensorReader(options.checkpoint), options.placement)
    write(rewrite, options.output, as_json=options.json)


def run_remove_exits(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint remove-exits`."""
    options = parse(RemoveExitsOptions, REMOVE_EXITS, arguments, _CHECKPOINT)
    from ee_llm.checkpoint.read import TensorReader
    from ee_llm.checkpoint.surgery.exits import removed
    from ee_llm.cli.checkpoint.rewriting import write

    rewrite = removed(TensorReader(options.checkpoint), options.exits)
    write(rewrite, options.output, as_json=options.json)


def run_average(arguments: list[str]) -> None:
    """Run `ee-llm checkpoint average`."""
    options = parse(AverageOptions, AVERAGE, arguments, ("checkpoints",))
    from ee_llm.checkpoint.surgery.average import averaged, open_all
    from ee_llm.cli.checkpoint.rewriting import write

    rewrite = averaged(open_all(options.checkpoints, options.last))
    write(rewrite, options.output, as_json=options.json)
