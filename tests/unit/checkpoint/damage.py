"""Damages one byte of a file at a time, and repairs it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.format import safe


def files_of(checkpoint: Path) -> list[str]:
    """Return the names of all files of a checkpoint."""
    return sorted(
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    )


def offsets_of(checkpoint: Path, name: str) -> list[int]:
    """Return the offsets at which to damage a file.

    For every file these are its ends; for a tensor file also the zip header, the pickle, the data
    and the directory of the first and the last block.
    """
    size = (checkpoint / name).stat().st_size
    offsets = {0, size // 3, size // 2, size - 1}
    blocks = blocks_of(checkpoint).get(name.removeprefix(f"{directory.TENSORS}/"), [])
    for position, length in {*blocks[:1], *blocks[-1:]}:
        offsets |= {position, position + 64, position + length // 2, position + length - 30}
    return sorted(offsets)


def blocks_of(checkpoint: Path, is_wanted=lambda name: True) -> dict[str, list[tuple[int, int]]]:
    """Return the position and length of the blocks of tensors by file."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, entry in safe.read_metadata(checkpoint / directory.TENSORS).items():
        for chunk in entry.chunks if is_wanted(name) else ():
            found.setdefault(chunk.file, []).append((chunk.position, chunk.length))
    return {file: sorted(blocks) for file, blocks in found.items()}


def flip(path: Path, offset: int) -> None:
    """Invert all bits of one byte."""
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


@contextlib.contextmanager
def flipped(path: Path, offset: int) -> Iterator[None]:
    """Invert one byte within a `with` block."""
    flip(path, offset)
    try:
        yield
    finally:
        flip(path, offset)
