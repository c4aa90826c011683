"""Tensors by name from a checkpoint, whatever layout wrote it; needs torch, not megatron-core."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ee_llm.checkpoint import directory, safe, tokenizer
from ee_llm.checkpoint.directory import resolve_checkpoint
from ee_llm.checkpoint.manifest import read_manifest
from ee_llm.checkpoint.safe import CheckpointError
from ee_llm.config import Config, load_config

CONFIG = "config.toml"
OPTIMIZER_PREFIX = "optimizer."
MASTER = f"{OPTIMIZER_PREFIX}state.fp32_param."
"""What stands before a parameter's name in that of its float32 master."""

FREE_MODEL = frozenset(("shape", "dropout", "init_std"))
"""Options of `model` that change neither which tensors there are nor what it computes."""

FUNCTION_OF_EXITS = ("boundaries", "head", "output", "temperatures")
"""Options of `exits` that change which tensors there are or what they compute."""

_NUM_SAMPLES, _SAMPLE = 64, 4096  # of each file, bytes of each

__all__ = ["CONFIG", "CheckpointError", "TensorReader", "resolve_checkpoint"]


class TensorReader:
    """The tensors, configuration and tokenizer of one checkpoint.

    Nothing that the files hold is run (`safe`). Tensors are read when asked for, one block of
    the file at a time.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a checkpoint, or the newest of a run directory.

        Raises CheckpointError if there is none, or if a file is missing, truncated or foreign.
        """
        self.path = resolve_checkpoint(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self._tensors = self.path / directory.TENSORS
        self._entries = safe.read_metadata(self._tensors)
        safe.check_sizes(self._tensors, self._entries)

    def names(self, *, optimizer: bool = False) -> list[str]:
        """Return the sorted names of the model's tensors, or of the optimizer's."""
        return sorted(
            name for name in self._entries if name.startswith(OPTIMIZER_PREFIX) == optimizer
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the whole tensor `name`; raises CheckpointError if there is none."""
        return torch.Size(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor `name`; raises CheckpointError if there is none."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor `name` on the CPU, assembled from the blocks of all ranks."""
        entry = self._entry(name)
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(whole, name, (0,) * len(entry.shape))
        return whole

    def read_into(self, target: torch.Tensor, name: str, offsets: Sequence[int]) -> None:
        """Fill `target` with the part of the tensor `name` that begins at `offsets`.

        The target's own shape states how much; values are converted to its dtype and device.
        Raises CheckpointError if that part is not within the tensor.
        """
        entry = self._entry(name)
        ends = [offset + size for offset, size in zip(offsets, target.shape, strict=True)]
        if any(end > size for end, size in zip(ends, entry.shape, strict=True)):
            raise CheckpointError(
                f"{self.path}: {name!r} has shape {list(entry.shape)}, the part from "
                f"{list(offsets)} to {ends} was asked for"
            )
        fill(target, self._tensors, name, entry, offsets)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this model from others of the same shape.

        They are of the configuration and of samples from every file of tensors, so that large
        models need no time: who trains on changes all weights.
        """
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for path in sorted(self._tensors.glob("*.distcp")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for number in range(_NUM_SAMPLES):
                    file.seek(number * max(0, size - _SAMPLE) // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()[:16]

    def config(self) -> Config:
        """Return the configuration that the checkpoint was trained with."""
        return load_config(self.path / CONFIG, None)

    def tokenizer(self) -> str:
        """Return the checkpoint's tokenizer as `data.tokenizer` names one: "bytes" or a path.

        Raises CheckpointError if it is missing, or not the one that the manifest states.
        """
        return tokenizer.proven(self.path, self.manifest["tokenizer"])

    def _entry(self, name: str) -> safe.TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}") from None


def fill(
    target: torch.Tensor,
    directory: Path,
    name: str,
    entry: safe.TensorEntry,
    offsets: Sequence[int],
) -> None:
    """Fill `target` with the part that begins at `offsets` of a tensor in a torch_dist directory.

    Raises CheckpointError if a file is missing, truncated or foreign.
    """
    ends = [offset + size for offset, size in zip(offsets, target.shape, strict=True)]
    for chunk in entry.chunks:
        lows = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        chunk_ends = [a + n for a, n in zip(chunk.offsets, chunk.sizes, strict=True)]
        highs = [min(a, b) for a, b in zip(ends, chunk_ends, strict=True)]
        if any(low >= high for low, high in zip(lows, highs, strict=True)):
            continue
        block = safe.read_chunk(directory, name, entry, chunk)
        part = block[_slices(lows, highs, chunk.offsets)]
        with torch.no_grad():
            target[_slices(lows, highs, offsets)].copy_(part)


def _slices(lows: Sequence[int], highs: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(lows, highs, origin, strict=True))
