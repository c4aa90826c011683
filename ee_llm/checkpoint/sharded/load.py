"""Loads a run from a checkpoint under any layout, after proving that it is whole and fits."""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ee_llm import distributed
from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.quantized import refuse_quantized
from ee_llm.checkpoint.read import CONFIG, FREE_MODEL, MASTER, TensorReader
from ee_llm.checkpoint.resume import is_path
from ee_llm.checkpoint.sharded import state_dict
from ee_llm.checkpoint.sharded.agreement import together
from ee_llm.checkpoint.sharded.generators import load_generators
from ee_llm.checkpoint.sharded.save import layout
from ee_llm.checkpoint.sharded.shard_reader import place, read
from ee_llm.checkpoint.state import STATE, TrainState, data_files
from ee_llm.config import Config
from ee_llm.errors import CheckpointError

distributed.enable_megatron()
from megatron.core.optimizer import MegatronOptimizer

_FIXED_EXITS = ("boundaries", "head", "output")


def load(
    path: str | Path,
    stages: Sequence[state_dict.ShardedModule],
    optimizer: MegatronOptimizer | None,
    config: Config,
    *,
    goes_on: bool | None = None,
) -> TrainState:
    """Return the state of the run in a checkpoint; stages, optimizer and generators get theirs.

    `path` is a checkpoint, or a run directory, whose newest is meant. Without an optimizer only
    the parameters are loaded, as to begin a new run from them, or, if it `goes_on`, to give it an
    optimizer afterwards. An optimizer that exists already must then be told
    (`reload_model_params`): it may hold masters of its own. Random generators
    are restored where the layout is the one that saved, for only then do they mean the same.
    Collective.

    Raises CheckpointError, before anything is changed, if a file is missing, truncated or foreign,
    if the model, its exits or the tokenizer are not those of `config`, if with an optimizer the
    order of its data is not, or if the checkpoint's tensors are not exactly those asked for.
    """
    what = f"can not load {path}"
    opened: list[tuple[TensorReader, TrainState]] = []
    if goes_on is None:
        goes_on = optimizer is not None
    together(what, lambda: opened.append(_open(path, config, goes_on=goes_on)))
    reader, state = opened[0]

    model: state_dict.Flat = {}
    moments: list[state_dict.OptimizerState] = []

    def describe() -> tuple[state_dict.Shapes, state_dict.Shapes]:
        model.update(state_dict.model_state(stages))
        if optimizer is None:
            return state_dict.tensor_shapes(model), {}
        moments.append(state_dict.OptimizerState(optimizer, model, is_loading=True))
        return state_dict.tensor_shapes(model), state_dict.tensor_shapes(moments[0].tensors())

    wanted: state_dict.Shapes = {}
    of_optimizer: state_dict.Shapes = {}
    for shapes, more in together(what, describe):
        wanted |= shapes
        of_optimizer |= more
    unbuilt = state_dict.unbuilt_shapes(config, wanted)
    wanted |= unbuilt
    together(what, lambda: compare_tensors(reader, wanted, of_optimizer))
    together(what, lambda: check_unread(reader, unbuilt))

    def fill() -> None:
        loaded = read(reader, _all_tensors(model, moments))
        place(model, loaded)
        for part in moments:
            part.load(loaded, reader.manifest["optimizer_steps"])
        if moments and saved_layout(reader) == layout(config):
            load_generators(reader, dist.get_rank())

    together(what, fill)
    return state


def check_unread(reader: TensorReader, names: Iterable[str]) -> None:
    """Verify this rank's share of tensors that no rank reads before the first save copies them.

    Raises CheckpointError if one is damaged: at the save the steps before it would be lost.
    """
    for name in sorted(names)[dist.get_rank() :: dist.get_world_size()]:
        reader.check_tensor(name)


def open_reader(
    path: str | Path, config: Config, compare: Callable[[Config, Config, Path], None]
) -> TensorReader:
    """Return a checkpoint's reader after looking at all but its tensors; raises CheckpointError.

    `compare` is given the checkpoint's configuration, this run's and the file of the first.
    """
    reader = TensorReader(path)
    refuse_quantized(reader)
    safe.check_common(reader.path / directory.TENSORS)
    compare(reader.config(), config, reader.path / CONFIG)
    tokenizer.check(config.data.tokenizer, reader.manifest["tokenizer"], reader.path)
    return reader


def _open(path: str | Path, config: Config, *, goes_on: bool) -> tuple[TensorReader, TrainState]:
    reader = open_reader(path, config, _compare_runs if goes_on else compare_configs)
    source, state = reader.path / STATE, reader.state()
    if goes_on:
        compare_files(state, config, source)
    else:
        state.data = []  # a new run's are its own
    if is_path(config.checkpoint.resume):
        state.origin = config.checkpoint.resume
    return reader, state


def saved_layout(reader: TensorReader) -> dict[str, int]:
    """Return the sizes of the parallel layout that wrote a checkpoint."""
    # Older manifests do not state the stages; the configuration beside them does.
    return {"stages": reader.config().parallel.num_stages, **reader.manifest["layout"]}


def _all_tensors(
    model: state_dict.Flat, moments: list[state_dict.OptimizerState]
) -> state_dict.Flat:
    tensors = dict(model)
    for part in moments:
        tensors |= part.tensors()
    return tensors


def _compare_runs(saved: Config, current: Config, source: Path) -> None:
    compare_tuning(saved, current, source)
    compare_configs(saved, current, source)
    compare_data(saved, current, source)


def compare_tuning(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError unless both runs train the same part of the model."""
    afresh = "begin a new run with its parameters: another --output, and"
    if current.is_tuning and not saved.is_tuning:
        raise CheckpointError(
            f"{source} is of a run that trained the whole model, and this one tunes exits; "
            f"{afresh} the checkpoint in tuning.checkpoint alone"
        )
    if saved.is_tuning and not current.is_tuning:
        raise CheckpointError(
            f"{source} is of a run that tuned exits {list(saved.tuning.exits)}, with no optimizer "
            f"state of the rest; {afresh} the checkpoint in checkpoint.initial"
        )
    if saved.tuning.exits != current.tuning.exits:
        raise CheckpointError(
            f"{source} is of a run that tuned exits {list(saved.tuning.exits)}, and tuning.exits = "
            f"{list(current.tuning.exits)}; use the checkpoint's, or {afresh} the checkpoint in "
            "tuning.checkpoint"
        )


def compare_configs(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError, naming the options that differ, unless both describe one model."""
    pairs = model_pairs(saved, current)
    if saved.exits.boundaries or current.exits.boundaries:
        pairs += exit_pairs(saved, current, _FIXED_EXITS)
    refuse_different(pairs, source)


Pairs = list[tuple[str, Any, Any]]  # option, its value in the checkpoint, in this run


def model_pairs(saved: Config, current: Config) -> Pairs:
    """Return the options that decide the model's tensors without exits, and its function."""
    return [
        (f"model.{name}", value, getattr(current.model, name))
        for name, value in saved.model.model_dump().items()
        if name not in FREE_MODEL and (name != "max_seq_length" or saved.model.position != "rope")
    ]


def exit_pairs(saved: Config, current: Config, names: Sequence[str]) -> Pairs:
    """Return the named options of exits."""
    return [(f"exits.{n}", getattr(saved.exits, n), getattr(current.exits, n)) for n in names]


def refuse_different(pairs: Pairs, source: Path) -> None:
    """Raise CheckpointError, naming them, if options differ."""
    if different := _differences(pairs):
        raise CheckpointError(
            f"{source} describes another model: {different}; use the checkpoint's values"
        )


def compare_data(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError unless the same sample comes at every position of the data.

    A run that goes on takes the position from the checkpoint, in samples: of another order it
    would meet some a second time and others never. All shares of the split count: a small one
    takes a document from the largest. Batch sizes and the folders of the prefixes are free.
    """

    def order(config: Config) -> dict[str, Any]:
        data = config.data
        return {
            "training.seed": config.training.seed,
            "data.prefixes": tuple(Path(prefix).name for prefix in data.prefixes),
            "data.weights": data.weights,
            "data.split": data.split,
            "data.seq_length": data.seq_length,
        }

    old, new = order(saved), order(current)
    for name in ("data.weights", "data.split"):
        if _proportions(old[name]) == _proportions(new[name]):
            del old[name]
    if different := _differences([(name, old[name], new[name]) for name in old]):
        raise CheckpointError(
            f"{source} is of a run that reads its data in another order: {different}; some samples "
            f"would come twice and others never: use the checkpoint's values, {_afresh(current)}"
        )


def compare_files(saved: TrainState, current: Config, source: Path) -> None:
    """Raise CheckpointError if the data's files are not as large as when the run first saved.

    Nothing is compared where the checkpoint does not state it, as older ones do not.
    """
    prefixes = current.data.prefixes
    for prefix, old, new in zip(prefixes, saved.data, data_files(prefixes), strict=False):
        for suffix, before, now in zip((".bin", ".idx"), old[1:], new[1:], strict=True):
            if before != now:
                raise CheckpointError(
                    f"{source} is of a run on other data: {prefix}{suffix} had {before} bytes and "
                    f"has {now}; some samples would come twice and others never: use the data of "
                    f"before, {_afresh(current)}"
                )


def _afresh(config: Config) -> str:
    # A path would load the position again, whatever the output.
    without = " and without checkpoint.resume" * is_path(config.checkpoint.resume)
    return f"or begin a new run with another --output{without}"


def _proportions(shares: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(str(share)) for share in shares]
    return [share / sum(exact) for share in exact]


def _differences(pairs: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(
        f"{name} is {_shown(old)} in the checkpoint and {_shown(new)} in this run"
        for name, old, new in pairs
        if old != new
    )


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def compare_tensors(
    reader: TensorReader, model: state_dict.Shapes, optimizer: state_dict.Shapes
) -> None:
    """Raise CheckpointError unless the checkpoint's tensors are exactly these, by name and shape.

    Without any of an optimizer's, the checkpoint's are not looked at.
    """
    wanted, with_optimizer = model | optimizer, bool(optimizer)
    stored = set(reader.names()) | set(reader.names(optimizer=True) if with_optimizer else ())
    missing, unexpected = sorted(wanted.keys() - stored), sorted(stored - wanted.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} tensors {words}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
            for names, words in (
                (missing, "are missing in it"),
                (unexpected, "in it are not of this run"),
            )
            if names
        ]
        hint = ""
        if any(name.startswith(MASTER) for name in (*missing, *unexpected)):
            hint = "; one of both was trained in bfloat16, the other not: see training.dtype"
        elif not reader.names(optimizer=True) and with_optimizer:
            hint = (
                "; it was saved without an optimizer, so that no run can go on from it: begin a new"
                " one with checkpoint.initial and another --output"
            )
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(parts)}{hint}")
    shapes = [
        f"{name} is {list(reader.shape(name))} in it and {list(shape)} in this run"
        for name, shape in sorted(wanted.items())
        if tuple(reader.shape(name)) != shape
    ]
    if shapes:
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(shapes[:8])}")
