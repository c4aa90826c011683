"""Encode a long text in overlapping chunks, with the same ids as the entire text.

The tokenizers library needs more than a hundred bytes of memory per byte of text.
"""

from collections.abc import Callable, Iterator
from typing import Any

CHUNK = 1 << 20
"""Characters per chunk, for which the library needs about 150 MB."""

_PROBE = 2000  # characters: a cheap test of a split point before encoding an entire chunk
_MAX_PROBES = 200


def encode_long_text(
    encode: Callable[[str], Any], text: str, *, splits_words: bool, size: int
) -> list[int]:
    """Return the ids of `text`, encoded in chunks of `size` characters where that is exact.

    The next chunk starts at the end of a word of the current chunk, far from the end of the chunk,
    so that the context after the split point is known. The next chunk must reproduce the ids of the
    overlap. If there is no such split point, the entire text is encoded at once.

    Args:
        encode: The library's encoding of a text, without special tokens.
        text: The text.
        splits_words: Whether the end of any token is a possible split point. This holds for
            byte-pair encoding, which encodes any sequence of complete tokens as these tokens. In
            other models, tokens depend on the entire word.
        size: Characters per chunk.
    """
    ids: list[int] = []
    start = 0
    chunk = encode(text[:size])
    while start + size < len(text):
        split = _next_chunk(encode, text, start, size, chunk, splits_words)
        if split is None:
            return list(encode(text).ids)
        count, start, next_chunk = split
        ids += chunk.ids[:count]
        chunk = next_chunk
    return ids + list(chunk.ids)


def _next_chunk(
    encode: Callable[[str], Any], text: str, start: int, size: int, chunk: Any, splits_words: bool
) -> tuple[int, int, Any] | None:
    """Return the number of ids of a chunk to keep, the start of the next chunk, and that chunk."""
    known = chunk.ids
    for count, index in _split_points(text, start, chunk, splits_words):
        overlap = (len(known) - count) // 2  # The other ids may depend on the text that follows.
        probe = encode(text[index : index + _PROBE]).ids
        num_same = min(overlap, len(probe) // 2)
        if num_same == 0 or probe[:num_same] != known[count : count + num_same]:
            continue
        next_chunk = encode(text[index : index + size])
        if next_chunk.ids[:overlap] != known[count : count + overlap]:
            continue
        # In a run of the same character, equal ids may cover different numbers of characters.
        ends = chunk.offsets[count + overlap - 1][1], next_chunk.offsets[overlap - 1][1]
        if start + ends[0] == index + ends[1]:
            return count, index, next_chunk
    return None


def _split_points(
    text: str, start: int, chunk: Any, splits_words: bool
) -> Iterator[tuple[int, int]]:
    """Yield possible split points, best first, as a number of ids and an index in the text."""
    words, offsets = chunk.word_ids, chunk.offsets
    counts = range(len(words) * 7 // 8, 0, -1)
    ends = [count for count in counts if words[count - 1] != words[count]][:_MAX_PROBES]
    if splits_words:
        ends += counts[:_MAX_PROBES]
    for count in ends:
        index = start + offsets[count - 1][1]
        if index > start:
            yield count, index
            if text[index] == " ":  # Some tokenizers add a space before a text.
                yield count, index + 1
