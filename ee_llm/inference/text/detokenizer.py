"""Detokenize tokens one by one, and end the text before the first stop string.

Each token is decoded in a window that includes a few tokens before it, so a text of n tokens costs
n short calls of the tokenizer. The text of a generation is the concatenation of its pieces.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from ee_llm.inference.request import Request

Detokenize = Callable[[list[int]], str]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the text of an incomplete character
_MIN_CONTEXT, _MAX_CONTEXT = 4, 16  # number of preceding tokens to decode a token with
_MAX_CHARACTER = 4  # tokens of a character, since UTF-8 has at most 4 bytes per character


class Detokenizer:
    """Returns the text that each token adds to a prompt.

    A character of several tokens belongs to the last of them. Bytes that do not form a character
    become replacement characters once no later token can complete them.
    """

    def __init__(self, detokenize: Detokenize, prompt: Sequence[int]) -> None:
        """Start after a prompt.

        Args:
            detokenize: Function from token ids to text, without special tokens.
            prompt: Token ids of the prompt.
        """
        self._detokenize = detokenize
        self._window = _context(detokenize, prompt)
        self._num_shown = len(self._window)
        self._known = detokenize(self._window).rstrip(_UNFINISHED)

    def add(self, token: int) -> str:
        """Return the text that `token` completes; it may be empty."""
        self._window.append(token)
        text = self._detokenize(self._window)
        if not text.endswith(_UNFINISHED) and len(text) >= len(self._known):
            piece = text[len(self._known) :]
            self._advance(text)
            return piece
        if len(self._window) - self._num_shown > _MAX_CHARACTER:
            return self.finish()
        return ""

    def finish(self) -> str:
        """Return the text of the tokens withheld so far, since no token follows."""
        pending = self._window[self._num_shown :]
        if not pending:
            return ""
        text = self._detokenize(pending)
        self._advance(self._known + text)
        return text

    def _advance(self, text: str) -> None:
        """Start the next window at the tokens just decoded; text: the text of the whole window.

        Keep the window if those tokens have no visible text, as special tokens: many tokenizers
        drop a leading space, and would then drop that of the next token.
        """
        context = self._window[self._num_shown :]
        known = self._detokenize(context)
        if known.strip() or len(self._window) > _MAX_CONTEXT:
            self._window, self._known = context, known
        else:
            self._known = text
        self._num_shown = len(self._window)


class GeneratedText:
    """The text of a generation, extended token by token.

    Attributes:
        pieces: Text that each token adds. Joined, they are the full text, not cut at a stop string.
        is_stopped: Whether the text contains a stop string.
    """

    def __init__(
        self,
        detokenize: Detokenize,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        special: Mapping[int, str] | None = None,
        min_tokens: int = 0,
    ) -> None:
        """Start after a prompt.

        Args:
            detokenize: Function from token ids to text, without special tokens.
            prompt: Token ids of the prompt.
            stops: Stop strings.
            special: Texts of special tokens by id, which stop strings may contain.
            min_tokens: Search for stop strings only in the text after this number of tokens.
        """
        self.pieces: list[str] = []
        self.is_stopped = False
        self._detokenizer = Detokenizer(detokenize, prompt)
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._special = dict(special or {})
        self._longest = max(map(len, self._stops), default=0)
        self._length = 0
        self._end: int | None = None
        self._untaken: list[str] = []  # text that `take_text` has not returned yet
        self._num_taken = 0
        # The newest text with special tokens spelled out, and the number of characters of plain
        # text before each of its characters.
        self._tail = ""
        self._before: list[int] = []

    @classmethod
    def of_request(cls, request: Request, detokenize: Detokenize) -> "GeneratedText":
        """Return the text of a request, still without tokens."""
        params = request.sampling_params
        special = dict(request.special_texts)
        return cls(detokenize, request.prompt_token_ids, params.stop, special, params.min_tokens)

    @property
    def text(self) -> str:
        """The text, up to the stop string that ended it if there is one."""
        return "".join(self.pieces)[: self._end]

    @property
    def trimmed_pieces(self) -> tuple[str, ...]:
        """The pieces, cut at the stop string that ended the text."""
        remaining, pieces = len(self.text), []
        for piece in self.pieces:
            pieces.append(piece[:remaining])
            remaining -= len(pieces[-1])
        return tuple(pieces)

    @property
    def num_safe(self) -> int:
        """Number of leading characters that no later stop string can remove."""
        if self._end is not None:
            return self._end
        return max(0, self._length - max(0, self._longest - 1))

    @property
    def num_characters(self) -> int:
        """Length of `text`."""
        return self._length if self._end is None else self._end

    def take_text(self, is_last: bool = False) -> str:
        """Return the text that has become final since the last call.

        The time does not depend on the length of the text before.

        Args:
            is_last: Whether the text is finished, and therefore all of it final.
        """
        end = self.num_characters if is_last else self.num_safe
        count = max(0, end - self._num_taken)
        text = "".join(self._untaken)
        self._untaken = [text[count:]]
        self._num_taken += count
        return text[:count]

    def add(self, token: int, *, skip_errors: bool = False) -> None:
        """Append a token.

        Args:
            token: Id of the token.
            skip_errors: If `detokenize` raises an exception, append a token without text instead
                of raising it.
        """
        spelled = self._special.get(token, "")
        try:
            piece = self._detokenizer.add(token)
            if spelled:
                piece += self._detokenizer.finish()
        except Exception:
            if not skip_errors:
                raise
            piece = ""
        self._append(piece, spelled)

    def finish(self, *, skip_errors: bool = False) -> None:
        """End the text: append the text that was withheld for later tokens.

        With `skip_errors`, append nothing if `detokenize` raises an exception.
        """
        try:
            piece = self._detokenizer.finish()
        except Exception:
            if not skip_errors:
                raise
            piece = ""
        if piece:
            last = self.pieces.pop()
            self._length -= len(last)
            self._append(last + piece, "", num_seen=len(last))

    def complete(self, tokens: Iterable[int], *, skip_errors: bool = False) -> "GeneratedText":
        """Append all tokens of a finished generation and return the text itself; see `add`."""
        for token in tokens:
            self.add(token, skip_errors=skip_errors)
        self.finish(skip_errors=skip_errors)
        return self

    def _append(self, piece: str, spelled: str, num_seen: int = 0) -> None:
        """Append a piece and search for stop strings.

        Args:
            piece: Text that the token adds.
            spelled: Text of the special token; empty for other tokens.
            num_seen: Number of leading characters of `piece` that were searched before.
        """
        self.pieces.append(piece)
        start, self._length = self._length, self._length + len(piece)
        self._untaken.append(piece[num_seen:])
        if not self._stops or self.is_stopped or len(self.pieces) <= self._min_tokens:
            return
        new = piece[num_seen:]
        self._tail += new + spelled
        self._before += range(start + num_seen, self._length)
        self._before += [self._length] * len(spelled)
        starts = [index for stop in self._stops if (index := self._tail.find(stop)) >= 0]
        if starts:
            self.is_stopped = True
            self._end = self._before[min(starts)]
        surplus = max(0, len(self._tail) - self._longest + 1)
        self._tail, self._before = self._tail[surplus:], self._before[surplus:]


def _context(detokenize: Detokenize, prompt: Sequence[int]) -> list[int]:
    """Return the end of a prompt to decode its continuation with.

    If possible, it begins at the start of a character and has visible text.
    """
    context: list[int] = []
    for length in range(_MIN_CONTEXT, _MAX_CONTEXT + 1):
        context = list(prompt[-length:])
        text = detokenize(context)
        if text.strip() and not text.startswith(_UNFINISHED):
            break
    return context
