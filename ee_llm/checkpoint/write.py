"""Writes a checkpoint tensor by tensor, without a run, ranks or megatron-core.

The files have the same format as those of `sharded.save`: torch_dist as written by torch. torch's
writer keeps all tensors in memory until the last one is on disk; this one needs memory for a single
tensor.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.checksums import checksum
from ee_llm.checkpoint.lock import OutputLock
from ee_llm.checkpoint.read import CONFIG
from ee_llm.checkpoint.state import STATE, TrainState
from ee_llm.config import Config
from ee_llm.errors import CheckpointError
from ee_llm.version import __version__

FILE = "__0_0.distcp"
BLOCK_BYTES = 32 * 2**20
"""The size of a block, which is the smallest part of a tensor that can be read."""


class TensorSpec(NamedTuple):
    """The shape and the dtype of a tensor that is not loaded."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Block(NamedTuple):
    """A part of a tensor: its offsets, its values and the name of its file."""

    offsets: tuple[int, ...]
    data: Tensor
    file: str


Blocks = Callable[[str, Tensor], Iterator[Block]]
"""Yields the blocks of a tensor, given its name and its values. They cover all of it."""


def write_checkpoint(
    output: str | Path,
    config: Config,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    *,
    tokenizer_file: str = tokenizer.BYTES,
    state: TrainState | None = None,
    facts: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    on_tensor: Callable[[str, int], None] | None = None,
    blocks: Blocks | None = None,
) -> Path:
    """Write a checkpoint of the given tensors and return its path.

    The checkpoint gets its final name once all of it is on disk; an interruption leaves none.

    Args:
        output: The run directory.
        config: The configuration of the model.
        specs: The shape and the dtype of every tensor by name.
        get: Returns a tensor by name. Called once per tensor, in the order of `specs`.
        tokenizer_file: "bytes", or the path of the file to copy. The configuration of the
            checkpoint names the copy.
        state: The progress of training; by default the model is untrained.
        facts: Further entries of the manifest.
        files: The contents of further files by name.
        on_tensor: Called with the name and the size in bytes of each written tensor.
        blocks: Divides tensors into blocks; by default into groups of rows, all in one file.

    Raises:
        CheckpointError: The output already has a checkpoint, a tensor differs from its spec, or
            writing fails. Exceptions of `get` propagate unchanged.
    """
    checkpoints = Path(output) / directory.CHECKPOINTS
    directory.check_output(output)
    get_errors: list[OSError] = []

    def get_tensor(name: str) -> Tensor:
        try:
            return get(name)
        except OSError as error:
            get_errors.append(error)
            raise

    lock = OutputLock(output)
    lock.take()
    try:
        directory.refuse_used(output)
        tokenizer.keep(tokenizer_file)
        state = state or TrainState()
        partial = directory.create_partial(checkpoints, state.step)
        try:
            tensors = partial / directory.TENSORS
            checksums = write_tensors(tensors, specs, get_tensor, on_tensor, blocks)
            final = checkpoints / directory.step_name(state.step)
            config = _placed(config, Path(output), final, tokenizer_file)
            for name, content in (files or {}).items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(content)
            tokenizer.store(tokenizer_file, partial)
            replace_text(partial / CONFIG, config.to_toml())
            directory.write_json(partial / STATE, state.to_json())
            known = _facts(state, tokenizer_file) | dict(facts or {})
            directory.seal(partial, known, checksums)
            return directory.publish(partial, keep_last=0)
        except OSError as error:
            if error in get_errors:
                raise
            space = directory.free_space(checkpoints)
            raise CheckpointError(f"cannot write {partial}: {error}{space}") from error
        finally:
            directory.discard(partial)  # a published checkpoint has another name
    finally:
        lock.release()


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    on_tensor: Callable[[str, int], None] | None = None,
    blocks: Blocks | None = None,
) -> dict[str, list[str]]:
    """Write the tensors of a checkpoint and return the checksums of its blocks.

    The checksums cover the bytes before writing, in the form that `directory.seal` expects. The
    arguments and the exceptions are those of `write_checkpoint`; `path` is the directory.
    """
    checksums: dict[str, list[str]] = {}
    entries: dict[str, index.STORAGE_TYPES] = {}
    places: dict[index.MetadataIndex, _StorageInfo] = {}
    for name, spec in specs.items():
        tensor = get(name)
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if found != spec:
            raise CheckpointError(
                f"{name}: expected {spec.dtype} {list(spec.shape)}, found {found.dtype} "
                f"{list(found.shape)}"
            )
        chunks = []
        for block in (blocks or in_rows)(name, tensor):
            offsets = torch.Size(block.offsets)
            content = _archive(block.data)
            file_name = f"{directory.TENSORS}/{block.file}"
            checksums.setdefault(file_name, []).append(checksum(content))
            places[index.MetadataIndex(name, offsets)] = _append(path / block.file, content)
            chunks.append(index.ChunkStorageMetadata(offsets, block.data.shape))
        properties = index.TensorProperties(dtype=spec.dtype)
        entries[name] = index.TensorStorageMetadata(properties, tensor.shape, chunks)
        if on_tensor is not None:
            on_tensor(name, spec.num_bytes)
    common = io.BytesIO()
    torch.save({}, common)
    (path / safe.COMMON).write_bytes(common.getvalue())
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in backends}
    directory.write_json(path / "metadata.json", {**backends, **versions})
    # The index is last: a directory without one has no tensors.
    (path / safe.METADATA).write_bytes(pickle.dumps(index.Metadata(entries, storage_data=places)))
    return checksums


def rows(part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of whole rows of at most BLOCK_BYTES, with the index of their first row."""
    if part.dim() == 0:
        yield 0, part
        return
    row_bytes = max(1, part[:1].numel() * part.dtype.itemsize)
    num_rows = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, len(part), num_rows):
        yield first, part[first : first + num_rows]


def in_rows(name: str, tensor: Tensor) -> Iterator[Block]:
    """Yield blocks of whole rows of a tensor, all in one file."""
    for first, block in rows(tensor):
        yield Block((first, *(0,) * (tensor.dim() - 1))[: tensor.dim()], block, FILE)


def _archive(block: Tensor) -> memoryview:
    content = io.BytesIO()  # torch.save to a path does not say when the disk is full
    # Copy the block: torch.save writes the whole storage of a view.
    torch.save(block.clone(memory_format=torch.contiguous_format), content)
    return content.getbuffer()


def _append(path: Path, content: memoryview) -> _StorageInfo:
    with open(path, "ab") as file:
        start = file.tell()
        file.write(content)
    return _StorageInfo(path.name, start, len(content))


def _placed(config: Config, output: Path, final: Path, tokenizer_file: str) -> Config:
    """Return the configuration with the checkpoint's own output directory and tokenizer."""
    name = tokenizer_file
    if name != tokenizer.BYTES:
        name = str(final / tokenizer.DIRECTORY / Path(tokenizer_file).name)
    data = config.data.model_copy(update={"tokenizer": name})
    return config.model_copy(update={"output": str(output), "data": data})


def _facts(state: TrainState, tokenizer_file: str) -> dict[str, Any]:
    layout = dict.fromkeys(("world", "tensor", "pipeline", "data", "stages"), 1)
    return {
        "optimizer_steps": 0,
        "layout": layout,
        "ee_llm": __version__,
        "step": state.step,
        "tokenizer": tokenizer.fingerprint(tokenizer_file),
    }
