"""Loads a run from a checkpoint under any layout, after proving that it is whole and fits."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ee_llm import platform
from ee_llm.checkpoint import directory, safe, sharded, tokenizer
from ee_llm.checkpoint.agree import together
from ee_llm.checkpoint.read import CONFIG, TensorReader
from ee_llm.checkpoint.resume import is_path
from ee_llm.checkpoint.safe import CheckpointError
from ee_llm.checkpoint.save import layout
from ee_llm.checkpoint.state import STATE, TrainState, data_files, load_generators
from ee_llm.config import Config

platform.enable_megatron()
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
)
from megatron.core.optimizer import MegatronOptimizer

# Options that may change between a checkpoint and the run that goes on from it: they change neither
# which tensors there are nor what the model computes at inference.
_FREE_MODEL = {"shape", "dropout", "init_std"}
_FIXED_EXITS = ("boundaries", "head", "output")
_FACTS = {"tokenizer": str, "optimizer_steps": int, "layout": dict}  # of the manifest


def load(
    path: str | Path,
    stages: Sequence[sharded.ShardedModule],
    optimizer: MegatronOptimizer | None,
    config: Config,
) -> TrainState:
    """Return the state of the run in a checkpoint; stages, optimizer and generators get theirs.

    `path` is a checkpoint, or a run directory, whose newest is meant. Without an optimizer only
    the parameters are loaded, as to begin a new run from them; an optimizer that exists already
    must then be told (`reload_model_params`): it may hold masters of its own. Random generators
    are restored where the layout is the one that saved, for only then do they mean the same.
    Collective.

    Raises CheckpointError, before anything is changed, if a file is missing, truncated or foreign,
    if the model, its exits or the tokenizer are not those of `config`, if with an optimizer the
    order of its data is not, or if the checkpoint's tensors are not exactly those asked for.
    """
    what = f"can not load {path}"
    opened: list[tuple[TensorReader, TrainState]] = []
    together(what, lambda: opened.append(_open(path, config, goes_on=optimizer is not None)))
    reader, state = opened[0]

    model: sharded.Flat = {}
    moments: list[sharded.OptimizerState] = []

    def describe() -> dict[str, tuple[int, ...]]:
        model.update(sharded.model_state(stages))
        if optimizer is not None:
            moments.append(sharded.OptimizerState(optimizer, model, is_loading=True))
        return sharded.tensor_shapes(_all_tensors(model, moments))

    wanted: dict[str, tuple[int, ...]] = {}
    for shapes in together(what, describe):
        wanted |= shapes
    together(what, lambda: _compare_tensors(reader, wanted, optimizer is not None))

    def fill() -> None:
        loaded = _read(reader, _all_tensors(model, moments))
        _place(model, loaded)
        for part in moments:
            part.load(loaded, reader.manifest["optimizer_steps"])
        if moments and _saved_layout(reader) == layout(config):
            load_generators(reader.path, dist.get_rank())

    together(what, fill)
    return state


def _open(path: str | Path, config: Config, *, goes_on: bool) -> tuple[TensorReader, TrainState]:
    reader = TensorReader(path)
    for name, kind in _FACTS.items():
        if not isinstance(found := reader.manifest.get(name), kind):
            manifest = reader.path / directory.MANIFEST
            raise CheckpointError(f"{manifest}: expected {name} ({kind.__name__}), found {found!r}")
    safe.check_common(reader.path / directory.TENSORS)
    compare_configs(reader.config(), config, reader.path / CONFIG)
    if goes_on:
        compare_data(reader.config(), config, reader.path / CONFIG)
    tokenizer.check(config.data.tokenizer, reader.manifest["tokenizer"], reader.path)
    source = reader.path / STATE
    state = TrainState.from_json(directory.read_json(source), source)
    if goes_on:
        compare_files(state, config, source)
    else:
        state.data = []  # a new run's are its own
    if is_path(config.checkpoint.resume):
        state.origin = config.checkpoint.resume
    return reader, state


def _saved_layout(reader: TensorReader) -> dict[str, int]:
    # Older manifests do not state the stages; the configuration beside them does.
    return {"stages": reader.config().parallel.num_stages, **reader.manifest["layout"]}


def _all_tensors(model: sharded.Flat, moments: list[sharded.OptimizerState]) -> sharded.Flat:
    tensors = dict(model)
    for part in moments:
        tensors |= part.tensors()
    return tensors


def compare_configs(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError, naming the options that differ, unless both describe one model."""
    pairs = [
        (f"model.{name}", value, getattr(current.model, name))
        for name, value in saved.model.model_dump().items()
        if name not in _FREE_MODEL and (name != "max_seq_length" or saved.model.position != "rope")
    ]
    if saved.exits.boundaries or current.exits.boundaries:
        pairs += [
            (f"exits.{name}", getattr(saved.exits, name), getattr(current.exits, name))
            for name in _FIXED_EXITS
        ]
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


def _compare_tensors(
    reader: TensorReader, wanted: dict[str, tuple[int, ...]], with_optimizer: bool
) -> None:
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
        if any(name.startswith(sharded.MASTER) for name in (*missing, *unexpected)):
            hint = "; one of both was trained in bfloat16, the other not: see training.dtype"
        elif not reader.names(optimizer=True) and with_optimizer:
            hint = "; it was saved without an optimizer, so that no run can go on from it"
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(parts)}{hint}")
    shapes = [
        f"{name} is {list(reader.shape(name))} in it and {list(shape)} in this run"
        for name, shape in sorted(wanted.items())
        if tuple(reader.shape(name)) != shape
    ]
    if shapes:
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(shapes[:8])}")


def _read(reader: TensorReader, flat: sharded.Flat) -> dict[str, torch.Tensor]:
    return dist_checkpointing.load(
        dict(flat),
        str(reader.path / directory.TENSORS),
        sharded_strategy=_SafeTensors(reader),
        common_strategy=_NothingInCommon(),
    )


def _place(model: sharded.Flat, loaded: dict[str, torch.Tensor]) -> None:
    """Copy what was not read in place: parameters that are stored in several parts."""
    with torch.no_grad():
        for path, shard in model.items():
            if loaded[path].data_ptr() != shard.data.data_ptr():
                shard.data.copy_(loaded[path])


class _SafeTensors(LoadShardedStrategy):
    """Reads shards through `TensorReader`, which unpickles nothing but passive data."""

    can_handle_sharded_objects = True  # there are none

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any) -> dict[str, Any]:
        return dict_list_map_outplace(self._shard, sharded_state_dict)

    def _shard(self, shard: ShardedTensor) -> torch.Tensor:
        assert not shard.prepend_axis_num, f"{shard.key}: every layer has names of its own"
        assert shard.flattened_range is None, f"{shard.key}: only whole shards are stored"
        if shard.data is None:
            shard.init_data(platform.device())
        target = shard.data.detach()
        self._reader.read_into(target, shard.key, shard.global_offset)
        return target

    def load_tensors_metadata(self, checkpoint_dir: Any) -> dict[str, Any]:
        raise NotImplementedError("names and shapes are compared before loading")

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        if loaded_backend != "torch_dist":
            raise CheckpointError(f"expected the format torch_dist, found {loaded_backend!r}")

    def check_version_compatibility(self, loaded_version: Any) -> None:
        if loaded_version != 1:
            raise CheckpointError(f"expected version 1 of torch_dist, found {loaded_version!r}")


class _NothingInCommon(LoadCommonStrategy):
    """Leaves `common.pt` alone: ours is empty, which was checked, and it is a pickle."""

    can_handle_sharded_objects = True

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
        raise NotImplementedError("checkpoints hold tensors only")

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        pass

    def check_version_compatibility(self, loaded_version: Any) -> None:
        pass
