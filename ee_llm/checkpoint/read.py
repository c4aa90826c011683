"""Reads tensors of a checkpoint of any parallel layout by name, without megatron-core."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.directory import resolve_checkpoint
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.format.blocks import Chunk
from ee_llm.checkpoint.format.checksums import Checksums
from ee_llm.checkpoint.format.json_content import parse_json
from ee_llm.checkpoint.format.manifest import read_manifest
from ee_llm.checkpoint.state import STATE, TrainState
from ee_llm.config import Config, load_config
from ee_llm.errors import CheckpointError

CONFIG = "config.toml"
RNG = "rng"
"""The directory with the states of each rank's random number generators."""

OPTIMIZER_PREFIX = "optimizer."
MASTER = f"{OPTIMIZER_PREFIX}state.fp32_param."
"""The prefix of a parameter's name in the name of its float32 master weight."""

FREE_MODEL = frozenset(("shape", "dropout", "init_std"))
"""Options of `model` that change neither its tensors nor its function."""

FUNCTION_OF_EXITS = ("boundaries", "head", "output", "temperatures")
"""Options of `exits` that change their tensors or their function."""

_TENSOR_FILE = ".distcp"

__all__ = ["CONFIG", "CheckpointError", "TensorReader", "resolve_checkpoint"]


class TensorReader:
    """The tensors, configuration and tokenizer of one checkpoint.

    No code in the files is executed (see `format.safe`). Tensors are read on access, one block at a
    time, and every block is compared with its checksum in the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a checkpoint, or the newest one of a run directory.

        Raises CheckpointError if there is none, if a file is missing, truncated or foreign, or if a
        file other than those of tensors and random generators is damaged.
        """
        self.path = resolve_checkpoint(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self.checksums = Checksums(self.path, self.manifest.get("crc32"))
        self._tensors = self.path / directory.TENSORS
        index = f"{directory.TENSORS}/{safe.METADATA}"
        self._entries = safe.parse_metadata(self.checksums.read(index), self._tensors)
        safe.check_sizes(self._tensors, self._entries)
        self._check_small_files()

    def _check_small_files(self) -> None:
        """Verify all files other than tensors and the random generators of ranks.

        The files of the tokenizer can be large, so only rank 0 verifies them here.
        """
        if not self.checksums.exist:
            return
        large = (tokenizer.DIRECTORY, tokenizer.ORIGIN)
        for name in self.manifest["files"]:
            folder = name.partition("/")[0]
            is_own = folder == RNG or name.endswith(_TENSOR_FILE)
            if not is_own and (distributed.is_rank_zero() or folder not in large):
                self.checksums.check_file(name)
        for name in tokenizer.file_names(self.path):
            if name not in self.manifest["files"]:
                raise CheckpointError(
                    f"{self.path / name} does not belong to this checkpoint: the manifest does not "
                    "name it. Remove it."
                )

    def names(self, *, optimizer: bool = False) -> list[str]:
        """Return the sorted names of the model's tensors, or of the optimizer's."""
        return sorted(
            name for name in self._entries if name.startswith(OPTIMIZER_PREFIX) == optimizer
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the tensor `name`; raises CheckpointError if there is none."""
        return torch.Size(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor `name`; raises CheckpointError if there is none."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor `name` on the CPU, assembled from the blocks of all ranks."""
        entry = self._entry(name)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(whole, name, (0,) * len(entry.shape))
        return whole

    def read_into(self, target: torch.Tensor, name: str, offsets: Sequence[int]) -> None:
        """Fill `target` with the part of the tensor `name` that starts at `offsets`.

        The part has the shape of `target`, and values are converted to its dtype and device. Raises
        CheckpointError if the part does not lie within the tensor.
        """
        entry = self._entry(name)
        ends = [offset + size for offset, size in zip(offsets, target.shape, strict=True)]
        if any(end > size for end, size in zip(ends, entry.shape, strict=True)):
            raise CheckpointError(
                f"{self.path}: {name!r} has shape {list(entry.shape)}, but the part from "
                f"{list(offsets)} to {ends} was requested"
            )
        fill(target, self._tensors, name, entry, offsets, self._check_block())

    def check_tensor(self, name: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read all blocks of the tensor `name`; raises CheckpointError if one is damaged.

        `on_bytes` is called with the number of bytes of each block.
        """
        entry = self._entry(name)
        for chunk in entry.chunks:
            safe.read_chunk(self._tensors, name, entry, chunk, self._check_block())
            if on_bytes is not None:
                on_bytes(chunk.length)

    def fingerprint(self) -> str:
        """Return a fingerprint of the model: 16 hexadecimal digits.

        It covers the configuration, the tokenizer and all tensor files: by their checksums, or by
        their content in a checkpoint without checksums, which takes as long as reading it.
        """
        digest = hashlib.sha256(self.manifest["tokenizer"].encode())
        for name in sorted(self.manifest["files"]):
            if name != CONFIG and not name.endswith(_TENSOR_FILE):
                continue
            digest.update(f"\n{name}\n".encode())
            if self.checksums.exist:
                digest.update(" ".join(self.manifest["crc32"][name]).encode())
            else:
                with (self.path / name).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def config(self) -> Config:
        """Return the configuration with which the checkpoint was trained."""
        return load_config(self.path / CONFIG, None)

    def state(self) -> TrainState:
        """Return the state of the run; raises CheckpointError if it is missing or damaged."""
        path = self.path / STATE
        state = TrainState.from_json(parse_json(self.checksums.read(STATE), path), path)
        stated = self.manifest.get("step", state.step)
        if stated != state.step:
            raise CheckpointError(
                f"{path}: step is {state.step}, but {stated!r} in {directory.MANIFEST} beside it. "
                "One of the files is damaged: restore it from a copy, or use another checkpoint."
            )
        return state

    def tokenizer(self) -> str:
        """Return the checkpoint's tokenizer as a value of `data.tokenizer`: "bytes" or a path.

        Raises CheckpointError if it is missing or is not the one that the manifest states.
        """
        return tokenizer.verified(self.path, self.manifest["tokenizer"])

    def _check_block(self) -> safe.CheckBlock | None:
        if not self.checksums.exist:
            return None

        def check(chunk: Chunk, data: bytes) -> None:
            self.checksums.check_block(f"{directory.TENSORS}/{chunk.file}", chunk.position, data)

        return check

    def _entry(self, name: str) -> safe.TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}") from None


def fill(
    target: torch.Tensor,
    directory: Path,
    name: str,
    entry: safe.TensorEntry,
    offsets: Sequence[int],
    check: safe.CheckBlock | None = None,
) -> None:
    """Fill `target` with the part of a tensor in a torch_dist directory that starts at `offsets`.

    `check` verifies the bytes of a block; without it, the checksums within the block are verified.
    Raises CheckpointError if a file is missing, truncated, damaged or foreign.
    """
    ends = [offset + size for offset, size in zip(offsets, target.shape, strict=True)]
    for chunk in entry.chunks:
        lows = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        chunk_ends = [a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        highs = [min(a, b) for a, b in zip(ends, chunk_ends, strict=True)]
        if any(low >= high for low, high in zip(lows, highs, strict=True)):
            continue
        block = safe.read_chunk(directory, name, entry, chunk, check)
        part = block[_slices(lows, highs, chunk.offsets)]
        with torch.no_grad():
            target[_slices(lows, highs, offsets)].copy_(part)


def _slices(lows: Sequence[int], highs: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(lows, highs, origin, strict=True))
