"""Exits added to a checkpoint, moved between stages, taken out of it; all else stays bit for bit.

Legend of shapes: h hidden, v vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ee_llm.architecture.initial_values import copy_source, initial_value
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.read import MASTER, TensorReader
from ee_llm.checkpoint.surgery.rewrite import (
    OPTIMIZER,
    Rewrite,
    copy_of,
    model_copy_of,
    model_of,
    parameter_of,
    with_options,
)
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import Config
from ee_llm.errors import CheckpointError, ConfigError

Initialization = Literal["copy", "random", "class-aware"]

_PER_EXIT = {"weights": 1.0, "initial_weights": 0.0, "temperatures": 1.0}


def config_with(
    reader: TensorReader,
    boundaries: Sequence[int],
    head: tuple[str, ...] | None = None,
    output: str | None = None,
) -> Config:
    """Return the configuration of a checkpoint's model with exits added at `boundaries`.

    head, output: as in the configuration; None for what the exits there have, or the defaults. A
    new exit's loss weighs 1, and its temperature is 1. Raises CheckpointError for boundaries that
    can have no new exit, or another head or output than that of the exits there.
    """
    config = model_of(reader.config())
    exits = config.exits
    _check_new(reader, config, boundaries)
    asked = {"head": head, "output": output}
    options = {name: value for name, value in asked.items() if value is not None}
    for name, value in options.items():
        if exits.boundaries and value != getattr(exits, name):
            option = {"head": "--head", "output": "--exit-output"}[name]
            raise CheckpointError(
                f"{option} {_shown(value)}: the exits that {reader.path} has are "
                f"{_shown(getattr(exits, name))}, and all are alike; leave {option} out"
            )
    return _with_exits(config, sorted({*exits.boundaries, *boundaries}), options)


def added(
    reader: TensorReader,
    config: Config,
    initialization: Initialization,
    output_weights: Mapping[int, Tensor] | None = None,
) -> Rewrite:
    """Return the checkpoint with the exits that `config` (of `config_with`) has and it lacks.

    copy: their parameters are those of `copy_source`. random: they are drawn from (training.seed,
    name), as a new model's are. class-aware: as copy, but for the output weights [v, h] of
    `output_weights` by boundary. The optimizer's moments of new parameters are 0; an optimizer that
    has a part of the parameters alone is left out.
    """
    whole = model_copy_of(reader)
    shapes = tensor_shapes(config)
    new = {name: shape for name, shape in shapes.items() if name not in reader}
    is_random = initialization == "random"
    sources = {name: None if is_random else copy_source(name, config) for name in new}
    weights = output_weights or {}

    def value(name: str) -> Tensor:
        boundary = int(name.split(".")[1])
        if initialization == "class-aware" and name.endswith(f".{boundary}.output.weight"):
            return weights[boundary]
        if (source := sources[name]) is None:
            return initial_value(name, shapes[name], config)
        return reader.tensor(source)

    def get(name: str) -> Tensor:
        parameter = parameter_of(name)
        if parameter not in new:
            return reader.tensor(name)
        spec = specs[name]
        is_moment = name != parameter and not name.startswith(MASTER)
        if is_moment:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        return value(parameter).to(spec.dtype)

    like = "embedding.word.weight"
    specs = dict(whole.specs)
    for name, shape in new.items():
        specs[name] = TensorSpec(shape, reader.dtype(sources[name] or like))
    optimizer = [name for name in whole.specs if name != parameter_of(name)]
    kinds = {name.removeprefix(OPTIMIZER).partition(".")[0] for name in optimizer}
    for kind in sorted(kinds):
        of_kind = reader.dtype(f"{OPTIMIZER}{kind}.{like}")
        for name, shape in new.items():
            specs[f"{OPTIMIZER}{kind}.{name}"] = TensorSpec(shape, of_kind)
    return replace(whole, config=config, specs=specs, get=get)


def moved(reader: TensorReader, placement: Literal["post", "pre"]) -> Rewrite:
    """Return the checkpoint with its exits placed before or behind the edges of stages.

    Raises CheckpointError if there is nothing to move, or if a head can not be there.
    """
    whole = copy_of(reader)
    exits = whole.config.exits
    if not exits.boundaries:
        raise CheckpointError(f"--placement {placement}: {reader.path} has no exits to move")
    if exits.placement == placement:
        raise CheckpointError(
            f"--placement {placement}: the exits of {reader.path} are placed so already"
        )
    try:
        config = with_options(whole.config, exits={"placement": placement})
    except ConfigError as error:
        raise CheckpointError(f"--placement {placement}: {error}") from None
    return replace(whole, config=config)


def removed(reader: TensorReader, boundaries: Sequence[int]) -> Rewrite:
    """Return the checkpoint without some exits, and without the optimizer's state of those.

    Raises CheckpointError for a boundary that has no exit, or the final one.
    """
    whole = model_copy_of(reader)
    config = whole.config
    there = config.exits.boundaries
    _check_named(boundaries)
    for boundary in boundaries:
        if boundary == config.model.num_layers:
            raise CheckpointError(
                f"--exits {boundary} is the final exit, the output of the model itself; 'ee-llm "
                "convert --truncate-at' ends a model at an earlier one"
            )
        if boundary not in there:
            raise CheckpointError(
                f"--exits {boundary}: {reader.path} has no exit there, it has them at {list(there)}"
            )
    own = tuple(f"exits.{boundary}." for boundary in boundaries)
    left = [boundary for boundary in there if boundary not in boundaries]
    specs = {
        name: spec for name, spec in whole.specs.items() if not parameter_of(name).startswith(own)
    }
    return replace(whole, config=_with_exits(config, left, {}), specs=specs)


def _check_new(reader: TensorReader, config: Config, boundaries: Sequence[int]) -> None:
    last, there = config.model.num_layers, config.exits.boundaries
    _check_named(boundaries)
    for boundary in boundaries:
        if not 1 <= boundary < last:
            raise CheckpointError(
                f"--exits {boundary}: {reader.path} has {last} layers, and an early exit is after "
                f"one of 1 to {last - 1}"
            )
        if boundary in there:
            raise CheckpointError(
                f"--exits {boundary}: {reader.path} has an exit there already, it has them at "
                f"{list(there)}; leave it out, or take it out first with 'ee-llm checkpoint "
                "remove-exits'"
            )


def _check_named(boundaries: Sequence[int]) -> None:
    if not boundaries:
        raise CheckpointError("--exits names none; give the layers, as --exits 8 16")
    if len(set(boundaries)) != len(boundaries):
        raise CheckpointError(f"--exits {_shown(boundaries)}: name each exit once")


def _with_exits(config: Config, boundaries: Sequence[int], options: Mapping[str, Any]) -> Config:
    """Return the configuration with exits at `boundaries`; those there keep what is theirs."""
    exits = config.exits
    values: dict[str, Any] = {"boundaries": tuple(boundaries), **options}
    for name, new in _PER_EXIT.items():
        known = dict(zip(exits.boundaries, getattr(exits, name), strict=True))
        values[name] = tuple(known.get(boundary, new) for boundary in boundaries)
    try:
        return with_options(config, exits=values)
    except ConfigError as error:
        raise CheckpointError(f"--exits {_shown(boundaries)}: {error}") from None


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
