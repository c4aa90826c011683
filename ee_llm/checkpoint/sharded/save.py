"""Writes everything of a run into one directory, which gets its name when it is whole."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from ee_llm import __version__, distributed
from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.checksums import checksums_of
from ee_llm.checkpoint.read import CONFIG, TensorReader
from ee_llm.checkpoint.sharded import state_dict
from ee_llm.checkpoint.sharded.agreement import on_first, together
from ee_llm.checkpoint.sharded.generators import save_generators
from ee_llm.checkpoint.sharded.save_unsharded import UnshardedTensors, write_unsharded
from ee_llm.checkpoint.state import STATE, TrainState, data_files
from ee_llm.config import Config
from ee_llm.errors import CheckpointError

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer


def save(
    output: str | Path,
    stages: Sequence[state_dict.ShardedModule],
    optimizer: MegatronOptimizer | UnshardedTensors | None,
    state: TrainState,
    config: Config,
    keep: Path | None = None,
    keep_mark: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Return the checkpoint of `state.step` that all ranks together wrote below `output`.

    An optimizer of `UnshardedTensors` gives parameters as well. With `keep`, a checkpoint, only
    what is trained is written anew: all other tensors of the model are that checkpoint's, bit for
    bit, whether the stages hold them or not; it is refused if its fingerprint is not `keep_mark`,
    where that is given. `files`: what else to keep, by name, see `tokenizer.companions`.

    It is written aside, flushed to disk, renamed, and `latest` is pointed at it; then all but the
    newest `config.checkpoint.keep_last` are removed. Collective.

    Raises CheckpointError on every rank if any rank fails (disk full, not writable): then the
    checkpoints there were, and `latest`, are as before. A rank that dies ends the others' wait
    by the time-out of the process group.
    """
    checkpoints = Path(output) / directory.CHECKPOINTS
    what = f"can not save {checkpoints / directory.step_name(state.step)}"
    partial = directory.partial_path(checkpoints, state.step)
    try:
        on_first(what, lambda: directory.create_partial(checkpoints, state.step))
        kept = keep and directory.settled(keep)
        if kept is not None and keep_mark is not None:
            on_first(what, lambda: _refuse_changed(kept, keep_mark))
        tensors = partial / directory.TENSORS
        if isinstance(optimizer, UnshardedTensors):
            steps, checksums = write_unsharded(what, tensors, optimizer, kept)
        else:
            steps, checksums = _write_tensors(what, tensors, stages, optimizer, kept)
        together(what, lambda: save_generators(partial, dist.get_rank()))
        facts = {"optimizer_steps": steps, "layout": layout(config), "ee_llm": __version__}
        on_first(what, lambda: _write_rest(partial, state, config, facts, files or {}, checksums))
        return on_first(what, lambda: directory.publish(partial, config.checkpoint.keep_last))
    except CheckpointError as error:
        # Measured before clearing up: torch's writer does not say that the disk is full.
        space = directory.free_space(checkpoints)
        if dist.get_rank() == 0:
            directory.discard(partial)
        raise CheckpointError(f"{error}{space}") from error


def layout(config: Config) -> dict[str, int]:
    """Return the sizes of the parallel layout of this run."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "stages": config.parallel.num_stages,
    }


def _write_tensors(
    what: str,
    path: Path,
    stages: Sequence[state_dict.ShardedModule],
    optimizer: MegatronOptimizer | None,
    keep: Path | None,
) -> tuple[int, dict[str, list[str]]]:
    """Write model and optimizer in megatron-core's torch_dist format.

    Returns the optimizer's steps, and the checksums of what all ranks wrote for `directory.seal`.
    The steps of `megatron.core.dist_checkpointing.save`, each of which may fail on one rank alone,
    with the ranks agreeing in between; and torch's own synchronous writer instead of
    megatron-core's, which starts a manager process and forks once per file.
    """
    described: list[state_dict.Flat] = []
    prepared: list[dict[str, Any]] = []
    kept: list[Kept] = []

    def describe() -> int:
        model = state_dict.model_state(stages)
        if keep is not None:
            model = state_dict.trained(model)
        if optimizer is None:
            described.append(model)
            return 0
        moments = state_dict.OptimizerState(optimizer, model, is_loading=False)
        described.append({**model, **moments.tensors()})
        return state_dict.optimizer_steps(optimizer)

    def prepare() -> None:
        # Checks on rank 0 that the shards of all ranks cover every tensor exactly once.
        tensors, _ = save_preprocess(described[0], validate_access_integrity=True)
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(
            tensors, keep_only_main_replica=True
        )
        prepared.append(mcore_to_pyt_state_dict(named))

    steps = max(together(what, describe))
    together(what, prepare)
    if keep is not None:
        written = set().union(*together(what, lambda: set(prepared[0])))
        together(what, lambda: kept.append(Kept(keep, written)))
        prepared[0] |= kept[0].placeholders
    on_first(what, lambda: _write_header(path))
    writer = _Writer(path, thread_count=1, sync_files=True)
    try:
        dcp.save(
            prepared[0],
            storage_writer=writer,
            planner=_Planner(kept[0] if kept else None),
        )
    except dcp.CheckpointException as error:  # raised on all ranks alike
        causes = {f"{type(cause[0]).__name__}: {cause[0]}" for cause in error.failures.values()}
        raise CheckpointError(f"{what}: {'; '.join(sorted(causes))}") from error
    checksums: dict[str, list[str]] = {}
    for of_rank in together(what, lambda: writer.checksums):
        checksums |= of_rank
    return steps, checksums


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which also takes the checksums of the blocks that this rank wrote."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self._directory = path
        self.checksums: dict[str, list[str]] = {}

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's files, and read them again, which takes them from memory."""
        written = super().write_data(plan, planner)
        places: dict[str, list[tuple[int, int]]] = {}
        for result in written.wait():
            block = result.storage_data
            places.setdefault(block.relative_path, []).append((block.offset, block.length))
        for name, blocks in places.items():
            ranges = checksums_of(self._directory / name, blocks)
            self.checksums[f"{directory.TENSORS}/{name}"] = ranges
        return written


class Kept:
    """This rank's share of the tensors that are copied from another checkpoint.

    Each is read when it is written, so that one at a time is in memory.
    """

    def __init__(self, checkpoint: Path, written: set[str]) -> None:
        """Divide what the checkpoint has of the model, and nobody has `written`, over the ranks."""
        self._reader = TensorReader(checkpoint)
        left = [name for name in self._reader.names() if name not in written]
        mine = left[dist.get_rank() :: dist.get_world_size()]
        self.placeholders = {
            name: torch.empty(
                self._reader.shape(name), dtype=self._reader.dtype(name), device="meta"
            )
            for name in mine
        }

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor `name`."""
        return self._reader.tensor(name)


class _Planner(MCoreSavePlanner):
    """megatron-core's planner, which fetches what is kept when the writer comes to it."""

    def __init__(self, kept: Kept | None) -> None:
        super().__init__(can_run_decentralized_global_plan=False, flatten_state_dict=False)
        self._kept = kept

    def resolve_data(self, write_item: Any) -> Any:
        """Return the tensor that an item of the plan stands for."""
        name = write_item.index.fqn
        if self._kept is not None and name in self._kept.placeholders:
            return self._kept.tensor(name)
        return super().resolve_data(write_item)


def _write_header(path: Path) -> None:
    """Write the two files that mark a directory as megatron-core's; nothing of ours is in them."""
    content = io.BytesIO()  # torch.save to a path reports a full disk as "iostream error"
    torch.save({}, content)
    (path / safe.COMMON).write_bytes(content.getvalue())
    save_config(CheckpointingConfig("torch_dist"), str(path))


def _refuse_changed(kept: Path, mark: str) -> None:
    found = TensorReader(kept).fingerprint()
    if found != mark:
        raise CheckpointError(
            f"{kept} is another model than the one this run began with (its fingerprint is "
            f"{found}, and was {mark}), so that what is frozen can not be copied from it; put the "
            "checkpoint back that tuning.checkpoint named, or begin again with a new --output"
        )


def _write_rest(
    partial: Path,
    state: TrainState,
    config: Config,
    facts: dict[str, Any],
    files: Mapping[str, bytes],
    checksums: Mapping[str, list[str]],
) -> None:
    tensors = partial / directory.TENSORS
    absent = {
        chunk.file
        for entry in safe.read_metadata(tensors).values()
        for chunk in entry.chunks
        if not (tensors / chunk.file).is_file()
    }
    if absent:
        raise CheckpointError(
            f"{', '.join(sorted(absent))}: written by other ranks, but not to be seen from rank 0; "
            "output must be on a file system that all machines share"
        )
    mark = tokenizer.fingerprint(config.data.tokenizer)
    tokenizer.store(config.data.tokenizer, partial)
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    replace_text(partial / CONFIG, config.to_toml())
    state.data = state.data or data_files(config.data.prefixes)
    directory.write_json(partial / STATE, state.to_json())
    directory.seal(partial, {**facts, "step": state.step, "tokenizer": mark}, checksums)
