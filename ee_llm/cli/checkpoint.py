"""`ee-llm checkpoint ...`: what is inside, and checkpoints made of checkpoints."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.integrity import Report, size_of, verify
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from ee_llm.checkpoint.surgery.average import averaged, open_all
from ee_llm.checkpoint.surgery.exits import added, config_with, moved, removed
from ee_llm.checkpoint.surgery.info import describe, show, tensors_of, verification
from ee_llm.checkpoint.surgery.reshard import Layout, resharded
from ee_llm.checkpoint.surgery.rewrite import Rewrite, write_rewrite
from ee_llm.cli.checkpoint_options import (
    AddExitsOptions,
    AverageOptions,
    InfoOptions,
    MoveExitsOptions,
    RemoveExitsOptions,
    ReshardOptions,
)
from ee_llm.config import Config
from ee_llm.config.limits import MAX_TIMEOUT_S, MIN_TIMEOUT_S
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import UserError
from ee_llm.inference.class_means import ClassMeans, Windows, class_means

_LONGEST = 2048  # what class-aware initialization shows a model at once: attention is quadratic


def info(options: InfoOptions) -> None:
    """Print what a checkpoint holds; raises CheckpointError if it is none or damaged."""
    report = _verified(options) if options.verify else None
    reader = TensorReader(options.checkpoint)
    facts = describe(reader)
    if report is not None:
        facts["verification"] = verification(report)
    if options.tensors:
        facts["all_tensors"] = tensors_of(reader)
    if options.json:
        print(json.dumps(facts))
    else:
        show(facts, Console(soft_wrap=True, highlight=False))


def _verified(options: InfoOptions) -> Report:
    """Return the report on an undamaged checkpoint; raises CheckpointError, naming damaged files.

    With --json the report on a damaged one is printed as well.
    """
    with _progress("verifying", size_of(options.checkpoint), options.json) as advance:
        report = verify(options.checkpoint, advance)
    if not report.problems:
        return report
    if options.json:
        print(json.dumps({"path": str(report.path), "verification": verification(report)}))
    raise CheckpointError("; ".join(report.problems))


def reshard(options: ReshardOptions) -> None:
    """Write a checkpoint with its blocks cut for another layout; raises UserError."""
    layout = Layout(options.tensor, options.pipeline, options.virtual, options.layer_split)
    reader = TensorReader(options.checkpoint)
    _write(resharded(reader, layout), options.output, options.json)


def add_exits(options: AddExitsOptions) -> None:
    """Write a checkpoint with more exits; raises UserError. On ranks, the first one writes."""
    reader = TensorReader(options.checkpoint)
    config = check_add_exits(options)
    if options.initialization != "class-aware":
        rewrite = added(reader, config, options.initialization)
        _write(rewrite, options.output, options.json)
        return
    ranks = None
    if options.tensor > 1:
        ranks = distributed.connect_serving(tensor=options.tensor, timeout_s=options.timeout_s)
    means = _class_means(options, reader, config, ranks)
    if distributed.is_rank_zero():
        rewrite = added(reader, config, "class-aware", means.weights)
        unseen = config.model.vocab_size - means.num_seen
        rewrite.notes.append(
            f"class-aware: {means.num_tokens:,} tokens; {unseen:,} of the vocabulary's "
            f"{config.model.vocab_size:,} are not among them and have the final exit's rows"
        )
        _write(rewrite, options.output, options.json)
    if ranks is not None:
        ranks.shutdown()


def move_exits(options: MoveExitsOptions) -> None:
    """Write a checkpoint with its exits placed elsewhere; raises UserError."""
    rewrite = moved(TensorReader(options.checkpoint), options.placement)
    _write(rewrite, options.output, options.json)


def remove_exits(options: RemoveExitsOptions) -> None:
    """Write a checkpoint without some of its exits; raises UserError."""
    rewrite = removed(TensorReader(options.checkpoint), options.exits)
    _write(rewrite, options.output, options.json)


def average(options: AverageOptions) -> None:
    """Write a checkpoint of mean weights; raises UserError."""
    rewrite = averaged(open_all(options.checkpoints, options.last))
    _write(rewrite, options.output, options.json)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "info": info,
    "reshard": reshard,
    "add-exits": add_exits,
    "move-exits": move_exits,
    "remove-exits": remove_exits,
    "average": average,
}


def check_add_exits(options: AddExitsOptions) -> Config:
    """Return the configuration with the new exits, before anything is started.

    Raises UserError for options that do not go together, or with the checkpoint.
    """
    reader = TensorReader(options.checkpoint)
    is_class_aware = options.initialization == "class-aware"
    output = options.exit_output
    if output is None and not reader.config().exits.boundaries:
        output = "own" if is_class_aware else "shared"
    config = config_with(reader, options.exits, options.head, output)
    if not MIN_TIMEOUT_S <= options.timeout_s <= MAX_TIMEOUT_S:
        raise UserError(
            f"--timeout-s {options.timeout_s}: give a number from {MIN_TIMEOUT_S} to "
            f"{MAX_TIMEOUT_S:,.0f}"
        )
    if not is_class_aware:
        for name, unset in (
            ("data", ()),
            ("num_tokens", None),
            ("seq_length", None),
            ("tensor", 1),
        ):
            if getattr(options, name) != unset:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --initialization "
                    f"{options.initialization}; leave it out, or take class-aware"
                )
        return config
    if config.exits.output != "own":
        raise UserError(
            f"--initialization class-aware makes output weights, and these exits have none "
            f"(exits.output = {config.exits.output}); give --exit-output own, or take copy"
        )
    if not options.data:
        raise UserError(
            "--initialization class-aware looks at data; give --data with the prefixes of what "
            "'ee-llm data prepare' made"
        )
    num_kv_heads = config.model.num_kv_heads
    if options.tensor < 1 or num_kv_heads % options.tensor:
        divisors = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
        raise UserError(
            f"--tensor {options.tensor} does not divide num_kv_heads = {num_kv_heads}; give one of "
            f"{divisors}"
        )
    longest = config.model.max_seq_length
    if options.seq_length is not None and not 1 <= options.seq_length <= longest:
        raise UserError(
            f"--seq-length {options.seq_length}: give 1 to {longest} (model.max_seq_length)"
        )
    directory.refuse_used(options.output)  # before the model has run
    return config


def _class_means(
    options: AddExitsOptions,
    reader: TensorReader,
    config: Config,
    ranks: distributed.InferenceGrid | None,
) -> ClassMeans:
    seq_length = options.seq_length or min(config.data.seq_length, _LONGEST)
    windows = Windows(options.data, seq_length, options.num_tokens)
    eos_token_id = load_tokenizer(reader.tokenizer(), config.data.eos_token).eos_token_id
    with _progress("looking at data", windows.num_tokens, options.json) as advance:
        return class_means(reader, config, options.exits, windows, eos_token_id, ranks, advance)


def _write(rewrite: Rewrite, output: Path, as_json: bool) -> None:
    specs = rewrite.specs
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    with _progress("writing", num_bytes, as_json) as advance:
        path = write_rewrite(rewrite, output, lambda _, size: advance(size))
    result = {
        "output": str(path),
        "notes": rewrite.notes,
        "tensors": len(specs),
        "bytes": num_bytes,
    }
    if as_json:
        print(json.dumps(result))
        return
    console = Console(soft_wrap=True, highlight=False)
    for note in rewrite.notes:
        console.print(f"note: {escape(note)}")
    console.print(f"{escape(str(path))}: {len(specs)} tensors, {num_bytes / 2**20:,.1f} MiB")


@contextmanager
def _progress(what: str, total: int, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    share = TextColumn("{task.percentage:.0f} %")
    with distributed.progress_bar(what, total, share, is_quiet=is_quiet) as bar:
        yield lambda amount: bar.advance(bar.task_ids[0], amount)
