"""Adds, moves and removes exits of a checkpoint; all other tensors are copied bit for bit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ee_llm.architecture.initial_values import copy_source, initial_value, is_exit_norm
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

Initialization = Literal["copy", "random", "class-aware", "least-squares"]

_PER_EXIT = {"weights": 1.0, "initial_weights": 0.0, "temperatures": 1.0}


def config_with(
    reader: TensorReader,
    boundaries: Sequence[int],
    head: tuple[str, ...] | None = None,
    output: str | None = None,
) -> Config:
    """Return the configuration of a checkpoint's model with exits added at `boundaries`.

    New exits have a loss weight and a temperature of 1.

    Args:
        reader: The checkpoint.
        boundaries: The boundaries of the new exits.
        head, output: The options of `exits`. None uses those of the existing exits, or the
            defaults.

    Raises:
        CheckpointError: A boundary cannot have a new exit, or the head or the output differs from
            that of the existing exits.
    """
    config = model_of(reader.config())
    exits = config.exits
    _check_new(reader, config, boundaries)
    given = {"head": head, "output": output}
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if exits.boundaries and value != getattr(exits, name):
            option = {"head": "--head", "output": "--exit-output"}[name]
            raise CheckpointError(
                f"{option} {_shown(value)}: the exits of {reader.path} have "
                f"{_shown(getattr(exits, name))}, and all exits must be alike. Leave {option} out."
            )
    return _with_exits(config, sorted({*exits.boundaries, *boundaries}), options)


def added(
    reader: TensorReader,
    config: Config,
    initialization: Initialization,
    computed: Mapping[str, Tensor] | None = None,
) -> Rewrite:
    """Return the checkpoint with the exits that `config` (from `config_with`) adds.

    The optimizer's moments of new parameters are 0. The state of an optimizer that covers only a
    part of the parameters is omitted. With exits.norm = shared, the new norms and their state are
    copies of the final norm's, whatever `initialization` says, because all norms must stay equal.

    Args:
        reader: The checkpoint.
        config: The configuration with the new exits.
        initialization: `copy` copies the parameters named by `copy_source`; `random` draws them as
            functions of (training.seed, name), as in a new model; `class-aware` and `least-squares`
            are `copy` except for the parameters in `computed`.
        computed: Parameters that were computed from data, by name.
    """
    whole = model_copy_of(reader)
    shapes = tensor_shapes(config)
    new = {name: shape for name, shape in shapes.items() if name not in reader}
    is_random = initialization == "random"
    shared = {name for name in new if config.exits.norm == "shared" and is_exit_norm(name)}
    sources = {
        name: copy_source(name, config) if name in shared or not is_random else None for name in new
    }
    values = computed or {}

    def value(name: str) -> Tensor:
        if name in values:
            return values[name]
        if (source := sources[name]) is None:
            return initial_value(name, shapes[name], config)
        return reader.tensor(source)

    def get(name: str) -> Tensor:
        parameter = parameter_of(name)
        if parameter not in new:
            return reader.tensor(name)
        if parameter in shared:
            return reader.tensor(name.replace(parameter, str(sources[parameter])))
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
        dtype = reader.dtype(f"{OPTIMIZER}{kind}.{like}")
        for name, shape in new.items():
            specs[f"{OPTIMIZER}{kind}.{name}"] = TensorSpec(shape, dtype)
    return replace(whole, config=config, specs=specs, get=get)


def moved(reader: TensorReader, placement: Literal["post", "pre"]) -> Rewrite:
    """Return the checkpoint with its exits placed at the ends or the starts of pipeline stages.

    Raises CheckpointError if there is nothing to move, or if a head cannot have that placement.
    """
    whole = copy_of(reader)
    exits = whole.config.exits
    if not exits.boundaries:
        raise CheckpointError(f"--placement {placement}: {reader.path} has no exits to move")
    if exits.placement == placement:
        raise CheckpointError(
            f"--placement {placement}: the exits of {reader.path} already have this placement"
        )
    try:
        config = with_options(whole.config, exits={"placement": placement})
    except ConfigError as error:
        raise CheckpointError(f"--placement {placement}: {error}") from None
    return replace(whole, config=config)


def removed(reader: TensorReader, boundaries: Sequence[int]) -> Rewrite:
    """Return the checkpoint without some of its exits and their optimizer state.

    Raises CheckpointError for a boundary without an exit, or for the final exit.
    """
    whole = model_copy_of(reader)
    config = whole.config
    existing = config.exits.boundaries
    _check_unique(boundaries)
    for boundary in boundaries:
        if boundary == config.model.num_layers:
            raise CheckpointError(
                f"--exits {boundary} is the final exit, which cannot be removed. Use 'ee-llm "
                "convert --truncate-at' to make an earlier exit the final one."
            )
        if boundary not in existing:
            raise CheckpointError(
                f"--exits {boundary}: {reader.path} has no exit there, only at {list(existing)}"
            )
    prefixes = tuple(f"exits.{boundary}." for boundary in boundaries)
    remaining = [boundary for boundary in existing if boundary not in boundaries]
    specs = {
        name: spec
        for name, spec in whole.specs.items()
        if not parameter_of(name).startswith(prefixes)
    }
    options = _supported(config, len(remaining), is_first=remaining == [1])
    rewrite = replace(whole, config=_with_exits(config, remaining, options), specs=specs)
    changed = ", ".join(f"exits.{name} = {value}" for name, value in options.items())
    if changed:
        rewrite.notes.append(f"for training with fewer exits: {changed}")
    return rewrite


def _supported(config: Config, count: int, *, is_first: bool) -> dict[str, Any]:
    """Return the options that must change so that `count` early exits can be trained.

    Args:
        config: The configuration before exits are removed.
        count: The number of remaining early exits.
        is_first: Whether the only remaining one is after layer 1, which has no weight by depth.
    """
    exits = config.exits
    options: dict[str, Any] = {}
    if count == 0 and exits.norm == "shared":
        options["norm"] = "own"
    if exits.weighting == "depth" and (count == 0 or is_first):
        options |= {"weighting": "weights", "depth_scale": 1.0}
    if exits.curriculum != "none" and (
        "weighting" in options or exits.rotation_interval > count + 1
    ):
        options |= {"curriculum": "none", "rotation_interval": 1}
    return options


def _check_new(reader: TensorReader, config: Config, boundaries: Sequence[int]) -> None:
    last, existing = config.model.num_layers, config.exits.boundaries
    _check_unique(boundaries)
    for boundary in boundaries:
        if not 1 <= boundary < last:
            raise CheckpointError(
                f"--exits {boundary}: {reader.path} has {last} layers. Choose layers from 1 to "
                f"{last - 1}."
            )
        if boundary in existing:
            raise CheckpointError(
                f"--exits {boundary}: {reader.path} already has exits at {list(existing)}. Leave "
                f"{boundary} out, or remove that exit first with 'ee-llm checkpoint remove-exits'."
            )


def _check_unique(boundaries: Sequence[int]) -> None:
    if not boundaries:
        raise CheckpointError("--exits is empty. Pass layers, for example --exits 8 16.")
    if len(set(boundaries)) != len(boundaries):
        raise CheckpointError(f"--exits {_shown(boundaries)}: pass each exit once")


def _with_exits(config: Config, boundaries: Sequence[int], options: Mapping[str, Any]) -> Config:
    """Return the configuration with exits at `boundaries`; existing ones keep their options."""
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
