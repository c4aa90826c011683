"""Turn tokens into text one by one, and end the text before the first stop string.

Each token is decoded in a window of a few tokens before it, so that a text of n tokens costs n
short calls of the tokenizer. The text of a generation is what its pieces join to.
"""

from collections.abc import Callable, Mapping, Sequence

Decode = Callable[[list[int]], str]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for a part of a character
_LEAST_CONTEXT, _MOST_CONTEXT = 4, 16  # tokens before the next one that it is decoded with
_MOST_HELD = 4  # tokens: UTF-8 has no longer character


class Detokenizer:
    """Gives the text that each token adds to a prompt.

    A character of several tokens belongs to the last of them. Bytes that are no character become
    replacement characters once no later token can complete them.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        """Begin after `prompt`; decode: token ids to text, special tokens left out."""
        self._decode = decode
        self._window = _context(decode, prompt)
        self._num_shown = len(self._window)
        self._known = decode(self._window).rstrip(_UNFINISHED)

    def add(self, token: int) -> str:
        """Return the text that is complete with `token`, perhaps an empty one."""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.endswith(_UNFINISHED) and len(text) >= len(self._known):
            piece = text[len(self._known) :]
            self._advance(text)
            return piece
        if len(self._window) - self._num_shown > _MOST_HELD:
            return self.finish()
        return ""

    def finish(self) -> str:
        """Return the text of the tokens held back so far: there is no later one."""
        held = self._window[self._num_shown :]
        if not held:
            return ""
        text = self._decode(held)
        self._advance(self._known + text)
        return text

    def _advance(self, text: str) -> None:
        """Let the next window begin with the tokens just shown; text: that of the whole window.

        Not if they have no visible text, as special tokens: many decoders drop a space that comes
        first, and the next token's would come first then.
        """
        context = self._window[self._num_shown :]
        known = self._decode(context)
        if known.strip() or len(self._window) > _MOST_CONTEXT:
            self._window, self._known = context, known
        else:
            self._known = text
        self._num_shown = len(self._window)


class GeneratedText:
    """The text of a generation as its tokens come.

    pieces: what each token adds to the text; joined, the whole text, not cut at a stop string.
    is_stopped: whether the text holds a stop string. special: the text of special tokens, which
    `decode` leaves out, where stop strings are to find them.
    """

    def __init__(
        self,
        decode: Decode,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        special: Mapping[int, str] | None = None,
    ) -> None:
        self.pieces: list[str] = []
        self.is_stopped = False
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = tuple(stops)
        self._special = dict(special or {})
        self._longest = max(map(len, self._stops), default=0)
        self._length = 0
        self._end: int | None = None
        # The newest text, special tokens spelled out, and how much plain text each character of
        # it has before it.
        self._tail = ""
        self._before: list[int] = []

    @property
    def text(self) -> str:
        """Return the text up to the stop string that ended it, or all of it."""
        return "".join(self.pieces)[: self._end]

    @property
    def num_safe(self) -> int:
        """Return how many characters of the text no later stop string can take away."""
        if self._end is not None:
            return self._end
        return max(0, self._length - max(0, self._longest - 1))

    def add(self, token: int) -> None:
        """Take in the next token; raises whatever `decode` does."""
        spelled = self._special.get(token, "")
        piece = self._detokenizer.add(token)
        if spelled:
            piece += self._detokenizer.finish()
        self._take(piece, spelled)

    def finish(self) -> None:
        """Take in the end: what was held back for later tokens is text now."""
        piece = self._detokenizer.finish()
        if piece:
            last = self.pieces.pop()
            self._length -= len(last)
            self._take(last + piece, "", num_seen=len(last))

    def _take(self, piece: str, spelled: str, num_seen: int = 0) -> None:
        self.pieces.append(piece)
        start, self._length = self._length, self._length + len(piece)
        if not self._stops or self.is_stopped:
            return
        new = piece[num_seen:]
        self._tail += new + spelled
        self._before += range(start + num_seen, self._length)
        self._before += [self._length] * len(spelled)
        places = [place for stop in self._stops if (place := self._tail.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            self._end = self._before[min(places)]
        surplus = max(0, len(self._tail) - self._longest + 1)
        self._tail, self._before = self._tail[surplus:], self._before[surplus:]


def generated_text(
    decode: Decode,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stops: Sequence[str] = (),
    special: Mapping[int, str] | None = None,
) -> GeneratedText:
    """Return the whole text of a finished generation."""
    text = GeneratedText(decode, prompt, stops, special)
    for token in tokens:
        text.add(token)
    text.finish()
    return text


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """Return the end of a prompt that its continuation is decoded with.

    It begins with a whole character and has visible text, if there is such an end.
    """
    context: list[int] = []
    for length in range(_LEAST_CONTEXT, _MOST_CONTEXT + 1):
        context = list(prompt[-length:])
        text = decode(context)
        if text.strip() and not text.startswith(_UNFINISHED):
            break
    return context
