"""Print the description of a checkpoint."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ee_llm.checkpoint.surgery.info import Facts


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
    columns = ("exit after", "stage", "head", "output weight", "temperature", "gate", "parameters")
    for column in columns:
        is_text = column in ("head", "output weight", "gate")
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
            row["gate"] or "-",
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
            "older version of ee-llm wrote this checkpoint without all checksums"
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
