"""Describes the contents of a checkpoint, as a table or as JSON."""

import math
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.partition import exit_stage
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.format.quantized import is_scale
from ee_llm.checkpoint.integrity import Report
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import parameter_of, specs_of

Facts = dict[str, Any]


def describe(reader: TensorReader) -> Facts:
    """Return a description of a checkpoint, of JSON types only.

    Raises CheckpointError if a file is missing or damaged.
    """
    config, state, manifest = reader.config(), reader.state(), reader.manifest
    specs = specs_of(reader)
    model = set(reader.names())
    by_dtype = Counter({str(specs[n].dtype).removeprefix("torch."): 0 for n in sorted(model)})
    for name in model:
        by_dtype[str(specs[name].dtype).removeprefix("torch.")] += specs[name].num_bytes
    optimizer = [name for name in specs if name not in model]
    trained = {parameter_of(name) for name in optimizer}
    return {
        "path": str(reader.path),
        "ee_llm": manifest.get("ee_llm"),
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_samples * config.data.seq_length,
        "mean_of": manifest.get("mean_of", []),
        "model": config.model.model_dump(),
        "parameters": sum(
            math.prod(specs[name].shape) for name in model if not is_scale(reader, name)
        ),
        "exits": _exits(reader),
        "exits_placement": config.exits.placement,
        "tokenizer": manifest["tokenizer"],
        "tensors": len(model),
        "bytes_by_dtype": dict(by_dtype),
        "optimizer": {
            "steps": manifest["optimizer_steps"],
            "tensors": len(optimizer),
            "bytes": sum(specs[name].num_bytes for name in optimizer),
            "parameters": len(trained),
        },
        "saved_by": manifest["layout"],
        "parallel": config.parallel.model_dump(),
        "blocks_for": manifest.get("blocks"),
        "files": len(manifest["files"]),
        "bytes_on_disk": sum(manifest["files"].values()),
        "checkpoints_of_the_run": [
            path.name
            for path in directory.complete_steps(reader.path.parent)
            if reader.path.parent.name == directory.CHECKPOINTS
        ],
    }


def tensors_of(reader: TensorReader) -> list[Facts]:
    """Return the name, dtype and shape of every tensor, the optimizer's last."""
    return [
        {
            "name": name,
            "dtype": str(spec.dtype).removeprefix("torch."),
            "shape": list(spec.shape),
        }
        for name, spec in specs_of(reader).items()
    ]


def verification(report: Report) -> Facts:
    """Return the result of verifying a checkpoint, of JSON types only."""
    return {
        "ok": not report.problems,
        "files": report.num_files,
        "bytes": report.num_bytes,
        "checksums": "all files" if report.has_checksums else "tensors only",
        "problems": report.problems,
        "extra_files": report.extra,
    }


def _exits(reader: TensorReader) -> list[Facts]:
    """Return the exits from shallow to deep, the final one last."""
    config = reader.config()
    exits, last = config.exits, config.model.num_layers
    temperatures = {
        last: 1.0,
        **dict(zip(exits.boundaries, exits.temperatures, strict=True)),
    }
    return [
        {
            "boundary": boundary,
            "stage": exit_stage(config, boundary),
            "head": ["norm"] if boundary == last else list(exits.head),
            "output_weight": output_weight_name(config, boundary),
            "temperature": temperatures[boundary],
            "parameters": sum(
                reader.shape(name).numel()
                for name in reader.names()
                if name.startswith(f"exits.{boundary}.") and not is_scale(reader, name)
            ),
        }
        for boundary in (*exits.boundaries, last)
    ]


def show(facts: Facts, console: Console) -> None:
    """Print a description from `describe`, with its tensors if it has them."""
    model, optimizer = facts["model"], facts["optimizer"]
    rows = [
        ("checkpoint", facts["path"]),
        ("written by", f"ee-llm {facts['ee_llm'] or '(not stated)'}"),
        ("trained", _trained(facts)),
        (
            "model",
            f"{model['family']}, {model['num_layers']} layers, hidden {model['hidden_size']}, "
            f"{model['num_heads']} heads ({model['num_kv_heads']} of keys and values), ffn "
            f"{model['ffn_hidden_size']}, {model['vocab_size']:,} tokens",
        ),
        ("parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors"),
        ("weights", ", ".join(f"{_size(n)} of {d}" for d, n in facts["bytes_by_dtype"].items())),
        ("optimizer", _optimizer(optimizer)),
        ("tokenizer", str(facts["tokenizer"])),
        ("layout", _layout(facts)),
        ("on disk", f"{_size(facts['bytes_on_disk'])} in {facts['files']} files"),
    ]
    if "verification" in facts:
        rows.append(("verified", _verification(facts["verification"])))
    for name, text in rows:
        console.print(f"{name:<12}{escape(text)}")
    console.print(_exit_table(facts))
    if "all_tensors" in facts:
        table = Table(box=None, pad_edge=False)
        for column in ("tensor", "dtype", "shape"):
            table.add_column(column, overflow="fold")
        for tensor in facts["all_tensors"]:
            table.add_row(escape(tensor["name"]), tensor["dtype"], str(tensor["shape"]))
        console.print(table)


def _exit_table(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("exit after", "stage", "head", "output weight", "temperature", "parameters"):
        is_text = column in ("head", "output weight")
        table.add_column(column, justify="left" if is_text else "right")
    last = facts["model"]["num_layers"]
    for row in facts["exits"]:
        final = " (final)" if row["boundary"] == last else ""
        table.add_row(
            f"layer {row['boundary']}{final}",
            str(row["stage"]),
            ", ".join(row["head"]) or "none",
            row["output_weight"],
            f"{row['temperature']:g}",
            f"{row['parameters']:,}",
        )
    return table


def _trained(facts: Facts) -> str:
    if facts["mean_of"]:
        steps = ", ".join(str(source["step"]) for source in facts["mean_of"])
        return f"the mean of {len(facts['mean_of'])} checkpoints, at steps {steps}"
    skipped = f", {facts['skipped_steps']} of them skipped" if facts["skipped_steps"] else ""
    return (
        f"step {facts['step']:,}{skipped}: {facts['consumed_samples']:,} sequences, "
        f"{facts['consumed_tokens']:,} tokens"
    )


def _optimizer(optimizer: Facts) -> str:
    if not optimizer["tensors"]:
        return "none: weights only; training cannot be resumed from it"
    return (
        f"{optimizer['steps']:,} steps, {_size(optimizer['bytes'])} for "
        f"{optimizer['parameters']} parameters"
    )


def _verification(found: Facts) -> str:
    text = f"{found['files']} files, {_size(found['bytes'])}: all checksums match"
    if found["checksums"] != "all files":
        text = (
            "all tensors match their checksums; other files only by size and form, because an "
            "older version of ee-llm wrote this checkpoint without checksums"
        )
    if found["extra_files"]:
        text += f"; extra files, which are not read: {', '.join(found['extra_files'][:8])}"
    return text


def _layout(facts: Facts) -> str:
    parallel, saved = facts["parallel"], facts["saved_by"]
    text = f"tensor {parallel['tensor']} x pipeline {parallel['pipeline']}"
    if parallel["virtual"] > 1:
        text += f" x virtual {parallel['virtual']}"
    text += f", exits placed {facts['exits_placement']}"
    if facts["blocks_for"]:
        text += ", with blocks for this layout"
    return f"{text}; saved by {saved['world']} rank{'s' * (saved['world'] != 1)}"


def _size(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.1f} KiB"
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
