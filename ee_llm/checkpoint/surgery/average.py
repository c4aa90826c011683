"""Averages the weights of several checkpoints (Izmailov et al., arXiv 1803.05407)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import FREE_MODEL, FUNCTION_OF_EXITS, TensorReader
from ee_llm.checkpoint.surgery.rewrite import Rewrite, copy_of, model_of
from ee_llm.config import Config
from ee_llm.errors import CheckpointError


def open_all(sources: Sequence[Path], last: int | None = None) -> list[TensorReader]:
    """Return the checkpoints to average: the given ones, or the newest `last` of one run directory.

    Raises CheckpointError for fewer than two checkpoints, or for one that is given twice.
    """
    if last is not None:
        if len(sources) != 1 or last < 2:
            raise CheckpointError(
                f"--last {last}: pass one run directory and a number of at least 2"
            )
        [run] = sources
        steps = directory.complete_steps(run / directory.CHECKPOINTS)
        newest = directory.find_latest(run)
        # Steps above the newest one are from before the run was resumed from an older checkpoint.
        steps = steps[: steps.index(newest) + 1] if newest in steps else steps
        if len(steps) < last:
            found = ", ".join(path.name for path in steps) or "none"
            raise CheckpointError(
                f"--last {last}: {run} has fewer checkpoints: {found}. Use a smaller --last, or"
                " train with a smaller checkpoint.interval."
            )
        return [TensorReader(path) for path in steps[-last:]]
    readers = [TensorReader(path) for path in sources]
    if len(readers) < 2:
        raise CheckpointError(
            "averaging needs at least two checkpoints. Pass them, or a run directory and --last 3."
        )
    paths = [reader.path.resolve() for reader in readers]
    for path in paths:
        if paths.count(path) > 1:
            raise CheckpointError(f"{path} is given more than once. Pass each checkpoint once.")
    return readers


def averaged(readers: Sequence[TensorReader]) -> Rewrite:
    """Return a checkpoint with the means of the weights of `readers`.

    Sums are computed in float64, or in float32 for 16-bit weights. Everything else comes from the
    last checkpoint. There is no optimizer state, so a run can start from the result but not resume.
    Raises CheckpointError naming a difference, unless all checkpoints have the same model.
    """
    last = readers[-1]
    for reader in readers[:-1]:
        _check_same(reader, last)
    specs = {name: spec for name, spec in copy_of(last).specs.items() if name in last.names()}

    def get(name: str) -> Tensor:
        dtype = specs[name].dtype
        total = torch.zeros(
            specs[name].shape, dtype=torch.float32 if dtype.itemsize == 2 else torch.float64
        )
        for reader in readers:
            total += reader.tensor(name)
        return total.div_(len(readers)).to(dtype)

    sources = [{"checkpoint": str(r.path), "step": r.state().step} for r in readers]
    notes = ["The averaged checkpoint has no optimizer state: a new run starts from it at step 0."]
    return replace(
        copy_of(last),
        config=model_of(last.config()),
        specs=specs,
        get=get,
        is_resumable=False,
        facts={"mean_of": sources},
        notes=notes,
    )


def _check_same(one: TensorReader, other: TensorReader) -> None:
    """Raise CheckpointError unless both are the same model, with the same or other weights."""
    mine, theirs = _options(one.config()), _options(other.config())
    differing = [name for name in mine if mine[name] != theirs[name]]
    if one.manifest["tokenizer"] != other.manifest["tokenizer"]:
        differing.append("tokenizer")
        mine["tokenizer"], theirs["tokenizer"] = (r.manifest["tokenizer"] for r in (one, other))
    for name in sorted({*one.names(), *other.names()}):
        kinds = [
            f"{r.dtype(name)} {list(r.shape(name))}" if name in r else "missing"
            for r in (one, other)
        ]
        if kinds[0] != kinds[1]:
            differing.append(name)
            mine[name], theirs[name] = kinds
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if differing[1:] else ""
        raise CheckpointError(
            f"{one.path} and {other.path} are different models: {name} is {mine[name]} in the "
            f"first and {theirs[name]} in the second{more}. Average checkpoints of one run."
        )


def _options(config: Config) -> dict[str, Any]:
    model = config.model.model_dump(exclude=set(FREE_MODEL))
    exits = (
        config.exits.model_dump(include=set(FUNCTION_OF_EXITS)) if config.exits.boundaries else {}
    )
    options = {f"model.{name}": value for name, value in model.items()}
    options["exits.boundaries"] = config.exits.boundaries
    return options | {f"exits.{name}": value for name, value in exits.items()}
