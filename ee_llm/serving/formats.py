"""Write the outputs of the engine in the formats of completions and of chats."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from ee_llm.inference.outputs import RequestOutput, TokenOutput
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from ee_llm.serving.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChatResponse,
)
from ee_llm.serving.protocol.completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    FinishReason,
    Usage,
)
from ee_llm.serving.protocol.ee import EEChunk, EEClamp, EEClamped, ee_output
from ee_llm.serving.protocol.logprobs import TokenText, chat_logprobs, completion_logprobs
from ee_llm.serving.protocol.sampling import GenerationFields

_Request = TypeVar("_Request", bound=GenerationFields)


@dataclass(frozen=True)
class Header:
    """What all chunks of a response have in common.

    Attributes:
        id: Id of the response.
        created: Time of the request, in seconds since 1970.
        model: Name of the model.
        system_fingerprint: Identity of the weights.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a response."""
        return dict(vars(self))


@dataclass
class Format(ABC, Generic[_Request]):
    """How the choices of one request are written.

    Attributes:
        request: The request.
        header: What all chunks have in common.
        token_text: Returns the text of a token id.
        clamps: What the operator's limits have changed in the request.
    """

    request: _Request
    header: Header
    token_text: TokenText
    clamps: Sequence[EEClamp] = ()

    @abstractmethod
    def first(self, index: int, prompt: EncodedPrompt) -> BaseModel | None:
        """Return the chunk before the first token of a choice, if there is one."""

    @abstractmethod
    def chunk(
        self, index: int, prompt: EncodedPrompt, token: TokenOutput, output: RequestOutput | None
    ) -> BaseModel:
        """Return the chunk of a token; output: the finished output if the token is the last."""

    @abstractmethod
    def last(self, usage: Usage) -> BaseModel:
        """Return the chunk with the usage, which ends a stream."""

    @abstractmethod
    def response(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[RequestOutput], usage: Usage
    ) -> BaseModel:
        """Return the response with all choices, each with its prompt."""

    def _ee_of_chunk(self, token: TokenOutput, output: RequestOutput | None) -> dict[str, Any]:
        """Return the field `ee` of a chunk: its token's exit, and in the last one the summary."""
        is_wanted = self.request.ee.return_exits
        if output is not None:
            found = self._ee_of_output(output)
            own = {"exits": [token.exit], "confidences": [token.confidence]}
            return {"ee": found["ee"].model_copy(update=own)} if is_wanted else found
        if not is_wanted:
            return {}
        return {"ee": EEChunk(exits=[token.exit], confidences=[token.confidence])}

    def _ee_of_output(self, output: RequestOutput) -> dict[str, Any]:
        """Return the field `ee` of a choice: its exits if wanted, and what the limits changed."""
        clamped = {"clamped": list(self.clamps)} if self.clamps else {}
        if self.request.ee.return_exits:
            return {"ee": ee_output(output).model_copy(update=clamped)}
        return {"ee": EEClamped(**clamped)} if clamped else {}

    def _usage(self, usage: Usage | None, *, is_chunk: bool) -> dict[str, Any]:
        """Return the usage of a response; chunks before the last have null, if they have any."""
        return {"usage": usage} if not is_chunk or self.request.include_usage else {}


@dataclass
class CompletionFormat(Format[CompletionRequest]):
    """The format of `/v1/completions`."""

    _offsets: dict[int, int] = field(default_factory=dict)  # characters sent, by choice

    def first(self, index: int, prompt: EncodedPrompt) -> BaseModel | None:
        """Return the chunk with the prompt, for `echo`."""
        if not self.request.echo:
            return None
        choice = CompletionChoice(index=index, text=prompt.text, logprobs=None, finish_reason=None)
        return self._response([choice], None, is_chunk=True)

    def chunk(
        self, index: int, prompt: EncodedPrompt, token: TokenOutput, output: RequestOutput | None
    ) -> BaseModel:
        """Return the chunk of a token."""
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(token.text)
        choice = CompletionChoice(
            index=index,
            text=token.text,
            logprobs=self._logprobs([token], offset),
            finish_reason=None if output is None else finish_reason(output),
            **self._ee_of_chunk(token, output),
        )
        return self._response([choice], None, is_chunk=True)

    def last(self, usage: Usage) -> BaseModel:
        """Return the chunk with the usage."""
        return self._response([], usage, is_chunk=False)

    def response(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[RequestOutput], usage: Usage
    ) -> BaseModel:
        """Return the response with all choices."""
        choices = []
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            before = prompt.text if self.request.echo else ""
            choices.append(
                CompletionChoice(
                    index=index,
                    text=before + (output.text or ""),
                    logprobs=self._logprobs(output.tokens, 0),
                    finish_reason=finish_reason(output),
                    **self._ee_of_output(output),
                )
            )
        return self._response(choices, usage, is_chunk=False)

    def _logprobs(self, tokens: Sequence[TokenOutput], offset: int) -> Any:
        if self.request.logprobs is None:
            return None
        return completion_logprobs(tokens, self.token_text, offset)

    def _response(
        self, choices: list[CompletionChoice], usage: Usage | None, *, is_chunk: bool
    ) -> BaseModel:
        fields = self.header.fields | {"object": "text_completion", "choices": choices}
        return CompletionResponse(**fields, **self._usage(usage, is_chunk=is_chunk))


class ChatFormat(Format[ChatRequest]):
    """The format of `/v1/chat/completions`."""

    def first(self, index: int, prompt: EncodedPrompt) -> BaseModel | None:
        """Return the chunk with the role."""
        delta = ChatDelta(role="assistant", content="")
        return self._chunk(
            [ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)], None
        )

    def chunk(
        self, index: int, prompt: EncodedPrompt, token: TokenOutput, output: RequestOutput | None
    ) -> BaseModel:
        """Return the chunk of a token."""
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=token.text),
            logprobs=self._logprobs([token]),
            finish_reason=None if output is None else finish_reason(output),
            **self._ee_of_chunk(token, output),
        )
        return self._chunk([choice], None)

    def last(self, usage: Usage) -> BaseModel:
        """Return the chunk with the usage."""
        return self._chunk([], usage)

    def response(
        self, prompts: Sequence[EncodedPrompt], outputs: Sequence[RequestOutput], usage: Usage
    ) -> BaseModel:
        """Return the response with all choices."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content=output.text or ""),
                logprobs=self._logprobs(output.tokens),
                finish_reason=finish_reason(output),
                **self._ee_of_output(output),
            )
            for index, output in enumerate(outputs)
        ]
        fields = self.header.fields | {"object": "chat.completion"}
        return ChatResponse(**fields, choices=choices, usage=usage)

    def _logprobs(self, tokens: Sequence[TokenOutput]) -> Any:
        if not self.request.logprobs:
            return None
        return chat_logprobs(tokens, self.token_text, self.request.top_logprobs or 0)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> BaseModel:
        fields = self.header.fields | {"object": "chat.completion.chunk", "choices": choices}
        is_chunk = usage is None
        return ChatChunk(**fields, **self._usage(usage, is_chunk=is_chunk))


def make_header(prefix: str, model: str, fingerprint: str) -> Header:
    """Return the header of a new response, whose id begins with `prefix`."""
    return Header(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, fingerprint)


def finish_reason(output: RequestOutput) -> FinishReason:
    """Return why a finished output ended, in OpenAI's words."""
    return "stop" if output.finish_reason in ("eos", "stop") else "length"


def to_json(response: BaseModel) -> str:
    """Return a response as JSON: fields that are not set are missing, null ones are null."""
    return response.model_dump_json(exclude_unset=True)
