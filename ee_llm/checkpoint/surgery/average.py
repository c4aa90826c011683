"""The mean of the weights of several checkpoints (Izmailov et al., arXiv 1803.05407)."""

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
    """Return the checkpoints to average: those named, or the newest `last` of one run directory.

    Raises CheckpointError for fewer than two, or for one that is named twice.
    """
    if last is not None:
        if len(sources) != 1 or last < 2:
            raise CheckpointError(
                f"--last {last}: give one run directory, and a number of 2 or more"
            )
        [run] = sources
        there = directory.complete_steps(run / directory.CHECKPOINTS)
        newest = directory.find_latest(run)
        # A run that went back to an older step has left what is above its newest one.
        there = there[: there.index(newest) + 1] if newest in there else there
        if len(there) < last:
            found = ", ".join(path.name for path in there) or "none"
            raise CheckpointError(f"--last {last}: {run} has fewer checkpoints: {found}")
        return [TensorReader(path) for path in there[-last:]]
    readers = [TensorReader(path) for path in sources]
    if len(readers) < 2:
        raise CheckpointError(
            "a mean needs two checkpoints or more; name them, or give a run directory and --last 3"
        )
    paths = [reader.path.resolve() for reader in readers]
    for path in paths:
        if paths.count(path) > 1:
            raise CheckpointError(
                f"{path} is given more than once; a mean counts each checkpoint once"
            )
    return readers


def averaged(readers: Sequence[TensorReader]) -> Rewrite:
    """Return the checkpoint whose weights are the means of those of `readers`.

    Sums are made in float64, or in float32 where weights have 16 bits; the rest comes from the last
    one. There is no optimizer's state: a run begins with it, it does not go on. Raises
    CheckpointError, naming what differs, unless all are of one model.
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
    notes = ["the mean has no optimizer's state: a run that is given it begins with it, at step 0"]
    return replace(
        copy_of(last),
        config=model_of(last.config()),
        specs=specs,
        get=get,
        goes_on=False,
        facts={"mean_of": sources},
        notes=notes,
    )


def _check_same(one: TensorReader, other: TensorReader) -> None:
    """Raise CheckpointError unless both hold the same model, if not the same weights."""
    mine, theirs = _described(one.config()), _described(other.config())
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
            f"{one.path} and {other.path} are not of one model: {name} is {mine[name]} in the "
            f"first and {theirs[name]} in the second{more}; average checkpoints of one run"
        )


def _described(config: Config) -> dict[str, Any]:
    model = config.model.model_dump(exclude=set(FREE_MODEL))
    exits = (
        config.exits.model_dump(include=set(FUNCTION_OF_EXITS)) if config.exits.boundaries else {}
    )
    found = {f"model.{name}": value for name, value in model.items()}
    found["exits.boundaries"] = config.exits.boundaries
    return found | {f"exits.{name}": value for name, value in exits.items()}
