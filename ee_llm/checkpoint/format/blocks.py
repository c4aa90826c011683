"""Blocks of a tensor: where they lie, and whether two of them meet."""

from collections.abc import Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """A block of a tensor: where it lies in the whole, and in which file."""

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
    """Return whether two blocks share an element, by a sweep along the most divided dimension.

    A block is compared only with those that reach beyond its beginning in that dimension.
    """
    offsets = [set(along) for along in zip(*(chunk.offsets for chunk in chunks), strict=True)]
    if not offsets:  # a scalar
        return len(chunks) > 1
    axis = max(range(len(offsets)), key=lambda i: len(offsets[i]))
    reaching: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        begin = chunk.offsets[axis]
        reaching = [other for other in reaching if other.offsets[axis] + other.sizes[axis] > begin]
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
