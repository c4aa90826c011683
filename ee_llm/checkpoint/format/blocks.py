"""Blocks of a tensor: their positions, and a check for overlaps."""

from collections.abc import Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """A block of a tensor: its position in the tensor and in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


def lies_in(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a block of `sizes` at `offsets` lies in a tensor of `shape`."""
    if not len(offsets) == len(sizes) == len(shape):
        return False
    return all(0 <= a <= a + n <= end for a, n, end in zip(offsets, sizes, shape, strict=True))


def any_overlap(chunks: Sequence[Chunk]) -> bool:
    """Return whether two blocks share an element.

    The search sweeps along the dimension with the most distinct offsets, and compares a block only
    with those that extend beyond its offset in that dimension.
    """
    offsets = [set(along) for along in zip(*(chunk.offsets for chunk in chunks), strict=True)]
    if not offsets:  # a scalar
        return len(chunks) > 1
    axis = max(range(len(offsets)), key=lambda i: len(offsets[i]))
    reaching: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        start = chunk.offsets[axis]
        reaching = [other for other in reaching if other.offsets[axis] + other.sizes[axis] > start]
        if any(_overlap(chunk, other) for other in reaching):
            return True
        reaching.append(chunk)
    return False


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + other_size and b < a + size
        for a, size, b, other_size in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )
