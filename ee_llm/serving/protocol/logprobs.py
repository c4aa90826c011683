"""Log probabilities in the formats of completions and of chats."""

from collections.abc import Callable, Sequence

from pydantic import BaseModel

from ee_llm.inference.outputs import TokenOutput

TokenText = Callable[[int], str]
"""Function from a token id to the text of this token alone."""

_LEAST = -9999.0  # JSON has no infinity.


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion, in parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A generated token, and the most probable tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of a message."""

    content: list[ChatLogprob]
    refusal: None = None


def completion_logprobs(
    tokens: Sequence[TokenOutput], token_text: TokenText, offset: int
) -> CompletionLogprobs:
    """Return the log probabilities of tokens; offset: number of characters before the first."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return CompletionLogprobs(
        tokens=[token_text(token.token_id) for token in tokens],
        token_logprobs=[max(token.logprob, _LEAST) for token in tokens],
        top_logprobs=[
            # Of several tokens with the same text, the most probable one.
            {token_text(id): max(one, _LEAST) for id, one in reversed(_with_own(token))}
            for token in tokens
        ],
        text_offset=offsets,
    )


def chat_logprobs(
    tokens: Sequence[TokenOutput], token_text: TokenText, num_top: int
) -> ChatLogprobs:
    """Return the log probabilities of tokens, each with the `num_top` most probable ones."""

    def entry(id: int, logprob: float) -> dict[str, object]:
        text = token_text(id)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(text.encode())}

    content = [
        ChatLogprob.model_validate(
            entry(token.token_id, token.logprob)
            | {"top_logprobs": [entry(*one) for one in token.top_logprobs[:num_top]]}
        )
        for token in tokens
    ]
    return ChatLogprobs(content=content, refusal=None)


def _with_own(token: TokenOutput) -> list[tuple[int, float]]:
    """Return the most probable tokens, and the token itself if it is not among them."""
    own = (token.token_id, token.logprob)
    has_own = any(id == token.token_id for id, _ in token.top_logprobs)
    return [*token.top_logprobs, *(() if has_own else (own,))]
