"""Encode a long text in overlapping pieces, with the ids that the whole text has.

The tokenizers library keeps more than a hundred bytes for each byte of a text that it encodes.
"""

from collections.abc import Callable, Iterator
from typing import Any

PIECE = 1 << 20
"""Characters of a piece: the library needs some 150 MB for it."""

_PROBE = 2000  # characters: a cheap test of a place to cut at, before a whole piece is encoded
_MAX_PROBES = 200


def encode_long_text(
    encode: Callable[[str], Any], text: str, *, splits_words: bool, size: int
) -> list[int]:
    """Return the ids of `text`, encoded in pieces of `size` characters where that is exact.

    A piece ends where the piece before it has the end of a word, far from its own end: what comes
    before is known with what follows it. The next piece starts there, and must repeat the ids of
    the overlap. For a tokenizer with which no place does that, the text is encoded whole.

    Args:
        encode: the library's encoding of a text, without special tokens.
        text: the text.
        splits_words: whether the end of any token will do. With byte-pair encoding it will, as
            every run of whole tokens is encoded as these tokens; the pieces of other models
            depend on the whole word.
        size: characters of a piece.
    """
    ids: list[int] = []
    start = 0
    piece = encode(text[:size])
    while start + size < len(text):
        found = _next_piece(encode, text, start, size, piece, splits_words)
        if found is None:
            return list(encode(text).ids)
        count, start, following = found
        ids += piece.ids[:count]
        piece = following
    return ids + list(piece.ids)


def _next_piece(
    encode: Callable[[str], Any], text: str, start: int, size: int, piece: Any, splits_words: bool
) -> tuple[int, int, Any] | None:
    """Return how many ids of a piece to keep, where the next one starts, and that one."""
    known = piece.ids
    for count, begin in _places(text, start, piece, splits_words):
        overlap = (len(known) - count) // 2  # the rest may depend on what follows the piece
        probe = encode(text[begin : begin + _PROBE]).ids
        num_same = min(overlap, len(probe) // 2)
        if num_same == 0 or probe[:num_same] != known[count : count + num_same]:
            continue
        following = encode(text[begin : begin + size])
        if following.ids[:overlap] != known[count : count + overlap]:
            continue
        # In a run of one character, equal ids may stand for another number of characters.
        ends = piece.offsets[count + overlap - 1][1], following.offsets[overlap - 1][1]
        if start + ends[0] == begin + ends[1]:
            return count, begin, following
    return None


def _places(text: str, start: int, piece: Any, splits_words: bool) -> Iterator[tuple[int, int]]:
    """Yield places to cut at, as a number of ids and an index in the text, best first."""
    words, offsets = piece.word_ids, piece.offsets
    counts = range(len(words) * 7 // 8, 0, -1)
    ends = [count for count in counts if words[count - 1] != words[count]][:_MAX_PROBES]
    if splits_words:
        ends += counts[:_MAX_PROBES]
    for count in ends:
        index = start + offsets[count - 1][1]
        if index > start:
            yield count, index
            if text[index] == " ":  # some tokenizers put a space of their own before a text
                yield count, index + 1
