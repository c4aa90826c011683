"""Writes a checkpoint tensor by tensor, without a run, ranks or megatron-core.

The files are those of `save`: torch_dist as torch's writer lays it out. That writer keeps every
tensor until the last is on disk; this one keeps none, so that what is needed in memory is the
tensor at hand.
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

from ee_llm import __version__
from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.checksums import checksum
from ee_llm.checkpoint.lock import OutputLock
from ee_llm.checkpoint.read import CONFIG
from ee_llm.checkpoint.state import STATE, TrainState
from ee_llm.config import Config
from ee_llm.errors import CheckpointError

FILE = "__0_0.distcp"
BLOCK_BYTES = 32 * 2**20
"""How much of a tensor lies together: who reads a part of it later reads that much at a time."""


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class Block(NamedTuple):
    """A part of a tensor: where it begins, its values, and the file it lies in."""

    offsets: tuple[int, ...]
    data: Tensor
    file: str


Blocks = Callable[[str, Tensor], Iterator[Block]]
"""Yields the blocks that a tensor of a name is stored in; together they are all of it."""


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
    """Return the checkpoint in the run directory `output` that holds the tensors `specs` names.

    `get` makes one tensor at a time, in the order of `specs`. The checkpoint gets its name when
    all of it is on disk; whoever is interrupted leaves none. `tokenizer_file`: "bytes" or the path
    of the file to copy, which the checkpoint's configuration then names. `state`: how far the model
    was trained, by default not at all. `facts`: more for the manifest. `files`: what else to keep,
    by name. `on_tensor`: called with the name and bytes of each tensor written. `blocks`: how
    tensors are cut, by default into whole rows, all in one file.

    Raises CheckpointError if the output holds a checkpoint already, if a tensor is not what its
    spec says, or if writing fails; what `get` raises passes through.
    """
    checkpoints = Path(output) / directory.CHECKPOINTS
    directory.check_output(output)
    not_ours: list[OSError] = []

    def made(name: str) -> Tensor:
        try:
            return get(name)
        except OSError as error:
            not_ours.append(error)
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
            checksums = write_tensors(tensors, specs, made, on_tensor, blocks)
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
            if error in not_ours:
                raise
            space = directory.free_space(checkpoints)
            raise CheckpointError(f"can not write {partial}: {error}{space}") from error
        finally:
            directory.discard(partial)  # what was published has another name by now
    finally:
        lock.release()


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
    on_tensor: Callable[[str, int], None] | None = None,
    blocks: Blocks | None = None,
) -> dict[str, list[str]]:
    """Write the directory of tensors of a checkpoint, and return the checksums of its blocks.

    They are those of what was to be written, in the form of `directory.seal`. Raises
    CheckpointError as `write_checkpoint` does.
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
    # Last: without its index it is no directory of tensors.
    (path / safe.METADATA).write_bytes(pickle.dumps(index.Metadata(entries, storage_data=places)))
    return checksums


def rows(part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of whole rows of at most BLOCK_BYTES, and the first row of each."""
    if part.dim() == 0:
        yield 0, part
        return
    row_bytes = max(1, part[:1].numel() * part.dtype.itemsize)
    num_rows = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, len(part), num_rows):
        yield first, part[first : first + num_rows]


def in_rows(name: str, tensor: Tensor) -> Iterator[Block]:
    """Yield a tensor in blocks of whole rows, all in one file."""
    for first, block in rows(tensor):
        yield Block((first, *(0,) * (tensor.dim() - 1))[: tensor.dim()], block, FILE)


def _archive(block: Tensor) -> memoryview:
    content = io.BytesIO()  # what torch.save raises where the disk is full does not say so
    # A copy: torch.save writes all of the memory that a view looks at.
    torch.save(block.clone(memory_format=torch.contiguous_format), content)
    return content.getbuffer()


def _append(path: Path, content: memoryview) -> _StorageInfo:
    with open(path, "ab") as file:
        begin = file.tell()
        file.write(content)
    return _StorageInfo(path.name, begin, len(content))


def _placed(config: Config, output: Path, final: Path, tokenizer_file: str) -> Config:
    """Return the configuration that the checkpoint states: where it is, with its own tokenizer."""
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
