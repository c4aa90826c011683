"""Requests and responses of `/v1/chat/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from ee_llm.inference.sampling.params import MAX_LOGPROBS
from ee_llm.serving.protocol.completions import FinishReason, ResponseHeader, Usage
from ee_llm.serving.protocol.ee import EEChunk, EEClamped, EEOutput
from ee_llm.serving.protocol.errors import bad_request
from ee_llm.serving.protocol.logprobs import ChatLogprobs
from ee_llm.serving.protocol.sampling import Count, GenerationFields

_MAX_MESSAGES = 4096


class ChatRequest(GenerationFields):
    """Body of `/v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationFields.unsupported,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),  # The template adds them.
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=_MAX_MESSAGES)]
    """The conversation. A content is a text, or a list of parts of type "text"."""

    max_completion_tokens: Count | None = None
    """Maximum number of tokens to generate; `max_tokens` is the older name."""

    logprobs: bool | None = None
    """Return the log probability of each token."""

    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Number of most probable tokens to return for each position, with `logprobs`."""

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to report; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens to generate; None for no limit but the context."""
        return self.max_completion_tokens or self.max_tokens

    def check_supported(self) -> None:
        """Raise ApiError for fields that this server does not support."""
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise bad_request(
                "top_logprobs needs logprobs = true. Set it, or remove top_logprobs.",
                "top_logprobs",
            )


class ChatMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatDelta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    ee: EEOutput | EEClamped | None = None
    """Only with `ee.return_exits`, or if the operator's limits have changed the request."""


class ChatChunkChoice(BaseModel):
    """The next token of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    ee: EEOutput | EEChunk | EEClamped | None = None
    """Only with `ee.return_exits`, or if the operator's limits have changed the request; a chunk
    before the last has only exits and confidences."""


class ChatResponse(ResponseHeader):
    """Response of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(ResponseHeader):
    """A chunk of the stream of `/v1/chat/completions`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
