"""Saves a run as one checkpoint, which appears under its name only when it is complete."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from ee_llm import distributed
from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.checksums import checksums_of
from ee_llm.checkpoint.read import CONFIG, TensorReader
from ee_llm.checkpoint.sharded import state_dict
from ee_llm.checkpoint.sharded.agreement import fail_together, run_on_rank_zero
from ee_llm.checkpoint.sharded.generators import save_generators
from ee_llm.checkpoint.sharded.save_unsharded import UnshardedTensors, write_unsharded
from ee_llm.checkpoint.state import STATE, TrainState, data_files
from ee_llm.config import Config
from ee_llm.errors import CheckpointError
from ee_llm.version import __version__

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
    base: Path | None = None,
    base_fingerprint: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Save a checkpoint of `state.step` below `output` from all ranks and return its path.

    The checkpoint is written to a temporary directory, flushed to disk and renamed, and `latest` is
    updated. Then all but the newest `config.checkpoint.keep_last` checkpoints are removed.
    Collective.

    Args:
        output: The run directory.
        stages: The model's stages on this rank.
        optimizer: The optimizer, if any. `UnshardedTensors` provide the parameters as well.
        state: The progress of the run.
        config: The configuration of the run.
        base: A checkpoint from which all tensors that are not trained are copied bit for bit,
            whether the stages have them or not.
        base_fingerprint: The expected fingerprint of `base`, if it is to be checked.
        files: The contents of further files by name, see `tokenizer.companions`.

    Raises:
        CheckpointError: Some rank failed, for example because the disk is full. Raised on every
            rank; the previous checkpoints and `latest` are unchanged. If a rank dies, the others
            wait until the process group's time-out.
    """
    checkpoints = Path(output) / directory.CHECKPOINTS
    what = f"cannot save {checkpoints / directory.step_name(state.step)}"
    partial = directory.partial_path(checkpoints, state.step)
    try:
        run_on_rank_zero(what, lambda: directory.create_partial(checkpoints, state.step))
        source = base and directory.restored_path(base)
        if source is not None and base_fingerprint is not None:
            run_on_rank_zero(what, lambda: _check_base(source, base_fingerprint))
        tensors = partial / directory.TENSORS
        if isinstance(optimizer, UnshardedTensors):
            steps, checksums = write_unsharded(what, tensors, optimizer, source)
        else:
            steps, checksums = _write_tensors(what, tensors, stages, optimizer, source)
        fail_together(what, lambda: save_generators(partial, dist.get_rank()))
        facts = {"optimizer_steps": steps, "layout": layout(config), "ee_llm": __version__}
        run_on_rank_zero(
            what, lambda: _write_rest(partial, state, config, facts, files or {}, checksums)
        )
        return run_on_rank_zero(
            what, lambda: directory.publish(partial, config.checkpoint.keep_last)
        )
    except CheckpointError as error:
        # Measure it before clean-up: torch's writer does not report that the disk is full.
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
    base: Path | None,
) -> tuple[int, dict[str, list[str]]]:
    """Write the model and the optimizer in megatron-core's torch_dist format.

    This repeats the steps of `megatron.core.dist_checkpointing.save`, any of which may fail on a
    single rank, and propagates errors after each step. It uses torch's synchronous writer instead
    of megatron-core's, which starts a manager process and forks once per file.

    Returns:
        The optimizer's steps, and the checksums of the blocks of all ranks for `directory.seal`.
    """
    described: list[state_dict.Flat] = []
    prepared: list[dict[str, Any]] = []
    copied: list[CopiedTensors] = []

    def describe() -> int:
        model = state_dict.model_state(stages)
        if base is not None:
            model = state_dict.trained(model)
        if optimizer is None:
            described.append(model)
            return 0
        moments = state_dict.OptimizerState(optimizer, model, is_loading=False)
        described.append({**model, **moments.tensors()})
        return state_dict.optimizer_steps(optimizer)

    def prepare() -> None:
        # Rank 0 checks that the shards of all ranks cover every tensor exactly once.
        tensors, _ = save_preprocess(described[0], validate_access_integrity=True)
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(
            tensors, keep_only_main_replica=True
        )
        prepared.append(mcore_to_pyt_state_dict(named))

    steps = max(fail_together(what, describe))
    fail_together(what, prepare)
    if base is not None:
        written = set().union(*fail_together(what, lambda: set(prepared[0])))
        fail_together(what, lambda: copied.append(CopiedTensors(base, written)))
        prepared[0] |= copied[0].placeholders
    run_on_rank_zero(what, lambda: _write_header(path))
    writer = _Writer(path, thread_count=1, sync_files=True)
    try:
        dcp.save(
            prepared[0],
            storage_writer=writer,
            planner=_Planner(copied[0] if copied else None),
        )
    except dcp.CheckpointException as error:  # raised on all ranks
        causes = {f"{type(cause[0]).__name__}: {cause[0]}" for cause in error.failures.values()}
        raise CheckpointError(f"{what}: {'; '.join(sorted(causes))}") from error
    checksums: dict[str, list[str]] = {}
    for rank_checksums in fail_together(what, lambda: writer.checksums):
        checksums |= rank_checksums
    return steps, checksums


class _Writer(dcp.FileSystemWriter):
    """torch's writer, extended by checksums of the blocks that this rank writes."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self._directory = path
        self.checksums: dict[str, list[str]] = {}

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's files and read them back, from memory, for their checksums."""
        written = super().write_data(plan, planner)
        places: dict[str, list[tuple[int, int]]] = {}
        for result in written.wait():
            block = result.storage_data
            places.setdefault(block.relative_path, []).append((block.offset, block.length))
        for name, blocks in places.items():
            ranges = checksums_of(self._directory / name, blocks)
            self.checksums[f"{directory.TENSORS}/{name}"] = ranges
        return written


class CopiedTensors:
    """This rank's share of the tensors that are copied from another checkpoint.

    A tensor is read when it is written, so that only one at a time is in memory.
    """

    def __init__(self, checkpoint: Path, written: set[str]) -> None:
        """Divide the checkpoint's model tensors that no rank has `written` among the ranks."""
        self._reader = TensorReader(checkpoint)
        names = [name for name in self._reader.names() if name not in written]
        own_names = names[dist.get_rank() :: dist.get_world_size()]
        self.placeholders = {
            name: torch.empty(
                self._reader.shape(name), dtype=self._reader.dtype(name), device="meta"
            )
            for name in own_names
        }

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor `name`."""
        return self._reader.tensor(name)


class _Planner(MCoreSavePlanner):
    """megatron-core's planner, extended by copied tensors, which are read when they are written."""

    def __init__(self, copied: CopiedTensors | None) -> None:
        super().__init__(can_run_decentralized_global_plan=False, flatten_state_dict=False)
        self._copied = copied

    def resolve_data(self, write_item: Any) -> Any:
        """Return the tensor of an item of the save plan."""
        name = write_item.index.fqn
        if self._copied is not None and name in self._copied.placeholders:
            return self._copied.tensor(name)
        return super().resolve_data(write_item)


def _write_header(path: Path) -> None:
    """Write the two files that mark a directory as megatron-core's; they contain no data."""
    content = io.BytesIO()  # torch.save to a path reports a full disk as "iostream error"
    torch.save({}, content)
    (path / safe.COMMON).write_bytes(content.getvalue())
    save_config(CheckpointingConfig("torch_dist"), str(path))


def _check_base(base: Path, fingerprint: str) -> None:
    found = TensorReader(base).fingerprint()
    if found != fingerprint:
        raise CheckpointError(
            f"{base} is not the model from which this run started (its fingerprint is {found}, and "
            f"was {fingerprint}), so the frozen tensors cannot be copied from it. Restore the "
            "original tuning.checkpoint, or start again with a new --output."
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
    missing = {
        chunk.file
        for entry in safe.read_metadata(tensors).values()
        for chunk in entry.chunks
        if not (tensors / chunk.file).is_file()
    }
    if missing:
        raise CheckpointError(
            f"{', '.join(sorted(missing))}: written by other ranks, but not visible to rank 0. Set "
            "output to a file system that all machines share."
        )
    fingerprint = tokenizer.fingerprint(config.data.tokenizer)
    tokenizer.store(config.data.tokenizer, partial)
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    replace_text(partial / CONFIG, config.to_toml())
    state.data = state.data or data_files(config.data.prefixes)
    directory.write_json(partial / STATE, state.to_json())
    directory.seal(partial, {**facts, "step": state.step, "tokenizer": fingerprint}, checksums)
