"""Classes of tokens by their text."""

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from ee_llm.data.tokenization.tokenizer import Tokenizer

CLASSES = ("word start", "word continuation", "number", "punctuation", "whitespace", "other")
"""The classes, in the order of reports.

The first character of a token that is not a space decides. A letter is the start of a word, unless
it directly follows a letter or a digit of the previous token: then it continues a word. Numbers
begin with a digit, punctuation with a punctuation mark or a symbol. A token of nothing but spaces
and line ends is whitespace. The rest, such as special tokens and parts of a character, is other.
"""

_ANCHOR = "x"


def token_classes(tokenizer: Tokenizer, previous: Tensor, tokens: Tensor) -> Tensor:
    """Return the index [t] in `CLASSES` of each token.

    Args:
        tokenizer: The tokenizer.
        previous: Ids [t] of the tokens before `tokens`.
        tokens: Ids [t].
    """
    texts = _Texts(tokenizer)
    pairs, inverse = torch.stack([previous, tokens]).unique(dim=1, return_inverse=True)
    found = [token_class(texts[a], texts[b]) for a, b in pairs.T.tolist()]
    return torch.tensor([CLASSES.index(name) for name in found])[inverse]


def token_class(previous: str, text: str) -> str:
    """Return the class of a token by its text and that of the token before it."""
    if not text:
        return "other"
    stripped = text.lstrip()
    if not stripped:
        return "whitespace"
    kind = unicodedata.category(stripped[0])[0]
    if kind in "LM":
        follows = len(stripped) == len(text) and unicodedata.category((previous or " ")[-1])[0]
        return "word continuation" if follows and follows in "LMN" else "word start"
    if kind == "N":
        return "number"
    is_whole = stripped[0] != "\N{REPLACEMENT CHARACTER}"
    return "punctuation" if kind in "PS" and is_whole else "other"


class _Texts(dict[int, str]):
    """The text of each token within a text: some tokenizers drop a space at its start."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._anchor: Sequence[int] = tokenizer.encode(_ANCHOR)
        self._start = len(tokenizer.decode(self._anchor))

    def __missing__(self, token: int) -> str:
        text = ""
        if token < self._tokenizer.vocab_size:  # A model may have further ids, as padding.
            text = self._tokenizer.decode([*self._anchor, token])[self._start :]
        self[token] = text
        return text
