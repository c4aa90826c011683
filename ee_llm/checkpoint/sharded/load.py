"""Loads a run from a checkpoint under any parallel layout, after checking that it fits."""

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
from ee_llm.checkpoint.sharded.agreement import fail_together
from ee_llm.checkpoint.sharded.generators import load_generators
from ee_llm.checkpoint.sharded.save import layout
from ee_llm.checkpoint.sharded.shard_reader import place, read
from ee_llm.checkpoint.state import STATE, TrainState, data_files
from ee_llm.config import Config
from ee_llm.errors import CheckpointError

distributed.enable_megatron()
from megatron.core.optimizer import MegatronOptimizer

_FIXED_EXITS = ("boundaries", "head", "output", "norm")


def load(
    path: str | Path,
    stages: Sequence[state_dict.ShardedModule],
    optimizer: MegatronOptimizer | None,
    config: Config,
    *,
    resumes: bool | None = None,
) -> TrainState:
    """Load the stages, the optimizer and the random generators, and return the run's state.

    Collective. The random generators are restored only if the parallel layout is the one that
    saved the checkpoint, because their states depend on it.

    Args:
        path: A checkpoint, or a run directory for its newest one.
        stages: The model's stages on this rank.
        optimizer: The optimizer, or None to load only parameters. An existing optimizer may have
            master weights and must then be updated with `reload_model_params`.
        config: The configuration of this run.
        resumes: Whether this run continues the saved one, so that its data must be the same; by
            default if there is an optimizer. Pass True to load the optimizer's state later.

    Raises:
        CheckpointError: A file is missing, truncated or foreign; the model, its exits or the
            tokenizer differ from those of `config`; the run resumes and the order of its data
            differs; or the checkpoint does not have exactly the expected tensors. Nothing has been
            changed then.
    """
    what = f"cannot load {path}"
    opened: list[tuple[TensorReader, TrainState]] = []
    if resumes is None:
        resumes = optimizer is not None
    fail_together(what, lambda: opened.append(_open(path, config, resumes=resumes)))
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
    for shapes, more in fail_together(what, describe):
        wanted |= shapes
        of_optimizer |= more
    unbuilt = state_dict.unbuilt_shapes(config, wanted)
    wanted |= unbuilt
    fail_together(what, lambda: compare_tensors(reader, wanted, of_optimizer))
    fail_together(what, lambda: check_unread(reader, unbuilt))

    def fill() -> None:
        loaded = read(reader, _all_tensors(model, moments))
        place(model, loaded)
        for part in moments:
            part.load(loaded, reader.manifest["optimizer_steps"])
        if moments and saved_layout(reader) == layout(config):
            load_generators(reader, dist.get_rank())

    fail_together(what, fill)
    return state


def check_unread(reader: TensorReader, names: Iterable[str]) -> None:
    """Verify this rank's share of the tensors that are first read when the next save copies them.

    Raises CheckpointError if one is damaged. Without this check the save would fail, and the steps
    before it would be lost.
    """
    for name in sorted(names)[dist.get_rank() :: dist.get_world_size()]:
        reader.check_tensor(name)


def open_reader(
    path: str | Path, config: Config, compare: Callable[[Config, Config, Path], None]
) -> TensorReader:
    """Open a checkpoint and check everything but its tensors; raises CheckpointError.

    `compare` is called with the checkpoint's configuration, this run's and the path of the former.
    """
    reader = TensorReader(path)
    refuse_quantized(reader)
    safe.check_common(reader.path / directory.TENSORS)
    compare(reader.config(), config, reader.path / CONFIG)
    tokenizer.check(config.data.tokenizer, reader.manifest["tokenizer"], reader.path)
    return reader


def _open(path: str | Path, config: Config, *, resumes: bool) -> tuple[TensorReader, TrainState]:
    reader = open_reader(path, config, _compare_runs if resumes else compare_configs)
    source, state = reader.path / STATE, reader.state()
    if resumes:
        compare_files(state, config, source)
    else:
        state.data = []  # a new run has its own data
    if is_path(config.checkpoint.resume):
        state.origin = config.checkpoint.resume
    return reader, state


def saved_layout(reader: TensorReader) -> dict[str, int]:
    """Return the sizes of the parallel layout that wrote a checkpoint."""
    # Older manifests do not state the number of stages, but the configuration does.
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
    new_run = "start a new run with its parameters: set another --output, and"
    if current.is_tuning and not saved.is_tuning:
        raise CheckpointError(
            f"{source} is from a run that trained the whole model, but this run tunes exits. To "
            f"use it, {new_run} only tuning.checkpoint to the checkpoint."
        )
    if saved.is_tuning and not current.is_tuning:
        raise CheckpointError(
            f"{source} is from a run that tuned exits {list(saved.tuning.exits)}, so it has no "
            f"optimizer state of the other parameters. To use it, {new_run} checkpoint.initial to "
            "the checkpoint."
        )
    if saved.tuning.exits != current.tuning.exits:
        raise CheckpointError(
            f"{source} is from a run that tuned exits {list(saved.tuning.exits)}, but tuning.exits "
            f"= {list(current.tuning.exits)}. Tune the same exits, or {new_run} tuning.checkpoint "
            "to the checkpoint."
        )


def compare_configs(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError naming the options that differ, unless both describe the same model."""
    pairs = model_pairs(saved, current)
    if saved.exits.boundaries or current.exits.boundaries:
        pairs += exit_pairs(saved, current, _FIXED_EXITS)
    refuse_different(pairs, source)


Pairs = list[tuple[str, Any, Any]]  # option, its value in the checkpoint, in this run


def model_pairs(saved: Config, current: Config) -> Pairs:
    """Return the options that determine the tensors and the function of the model without exits."""
    return [
        (f"model.{name}", value, getattr(current.model, name))
        for name, value in saved.model.model_dump().items()
        if name not in FREE_MODEL and (name != "max_seq_length" or saved.model.position != "rope")
    ]


def exit_pairs(saved: Config, current: Config, names: Sequence[str]) -> Pairs:
    """Return the named options of `exits`."""
    return [(f"exits.{n}", getattr(saved.exits, n), getattr(current.exits, n)) for n in names]


def refuse_different(pairs: Pairs, source: Path) -> None:
    """Raise CheckpointError naming the options that differ, if any."""
    if different := _differences(pairs):
        raise CheckpointError(
            f"{source} describes another model: {different}. Use the checkpoint's values."
        )


def compare_data(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError unless both runs read the same sample at every position of the data.

    A resumed run takes its position in the data, in samples, from the checkpoint. In another order
    it would read some samples twice and others never. All shares of the split matter, because a
    small share takes a document from the largest one. Batch sizes and the directories of the
    prefixes may differ.
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
            f"{source} is from a run that reads its data in another order: {different}. Some "
            "samples would be read twice and others never. Use the checkpoint's values, or "
            f"{_new_run(current)}."
        )


def compare_files(saved: TrainState, current: Config, source: Path) -> None:
    """Raise CheckpointError if the sizes of the data files differ from those at the first save.

    Older checkpoints do not state the sizes, and are not compared.
    """
    prefixes = current.data.prefixes
    for prefix, old, new in zip(prefixes, saved.data, data_files(prefixes), strict=False):
        for suffix, before, now in zip((".bin", ".idx"), old[1:], new[1:], strict=True):
            if before != now:
                raise CheckpointError(
                    f"{source} is from a run on other data: {prefix}{suffix} had {before} bytes "
                    f"and now has {now}. Some samples would be read twice and others never. Use "
                    f"the original data, or {_new_run(current)}."
                )


def _new_run(config: Config) -> str:
    # A path in checkpoint.resume would load the position again, whatever the output.
    without = " and without checkpoint.resume" * is_path(config.checkpoint.resume)
    return f"start a new run with another --output{without}"


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
    """Raise CheckpointError unless the checkpoint's tensors have exactly these names and shapes.

    The optimizer's tensors are ignored if `optimizer` is empty.
    """
    wanted, with_optimizer = model | optimizer, bool(optimizer)
    stored = set(reader.names()) | set(reader.names(optimizer=True) if with_optimizer else ())
    missing, unexpected = sorted(wanted.keys() - stored), sorted(stored - wanted.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} tensors {words}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
            for names, words in (
                (missing, "are missing"),
                (unexpected, "are not used by this run"),
            )
            if names
        ]
        hint = ""
        if any(name.startswith(MASTER) for name in (*missing, *unexpected)):
            hint = ". Only one of the two runs uses bfloat16: check training.dtype."
        elif not reader.names(optimizer=True) and with_optimizer:
            hint = (
                ". It was saved without an optimizer, so training cannot be resumed from it. Start "
                "a new run with checkpoint.initial and another --output."
            )
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(parts)}{hint}")
    shapes = [
        f"{name} has shape {list(reader.shape(name))}, but {list(shape)} in this run"
        for name, shape in sorted(wanted.items())
        if tuple(reader.shape(name)) != shape
    ]
    if shapes:
        raise CheckpointError(f"{reader.path} does not fit: {'; '.join(shapes[:8])}")
