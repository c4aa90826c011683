"""Requests and responses of `/v1/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from ee_llm.inference.sampling.params import MAX_LOGPROBS
from ee_llm.inference.text.json_lines import short
from ee_llm.serving.protocol.ee import EEChunk, EEClamped, EEOutput
from ee_llm.serving.protocol.errors import bad_request
from ee_llm.serving.protocol.logprobs import CompletionLogprobs
from ee_llm.serving.protocol.sampling import MAX_CHOICES, GenerationFields

DEFAULT_MAX_TOKENS = 16
"""Number of tokens that OpenAI's API generates by default."""

Prompt = str | list[int]
FinishReason = Literal["stop", "length"]


def _prompts(given: Any) -> list[Prompt]:
    """Return one or several prompts, each a text or token ids, as a list."""
    is_list = isinstance(given, list)
    prompts = [given] if not is_list or (given and type(given[0]) is int) else given
    for prompt in prompts:
        if not (
            isinstance(prompt, str)
            or (isinstance(prompt, list) and all(type(token) is int for token in prompt))
        ):
            raise ValueError(f"{short(prompt)} is neither a text nor a list of token ids")
        if not prompt:
            raise ValueError("a prompt is empty; give at least one token")
    if not 1 <= len(prompts) <= MAX_CHOICES:
        raise ValueError(f"{len(prompts)} prompts given; give 1 to {MAX_CHOICES}")
    return prompts


class CompletionRequest(GenerationFields):
    """Body of `/v1/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationFields.unsupported,
        "suffix": ("",),
        "best_of": (1,),
        "add_special_tokens": (True,),
    }

    prompt: Annotated[list[str | list[int]] | str | list[int], BeforeValidator(_prompts)]
    """A text, token ids, or a list of either."""

    echo: bool | None = None
    """Return the prompt before each completion."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Number of most probable tokens to return for each position."""

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to report; None for no log probabilities."""
        return self.logprobs

    def check_supported(self) -> None:
        """Raise ApiError for fields that this server does not support."""
        super().check_supported()
        if self.echo and self.logprobs is not None:
            raise bad_request(
                "echo with logprobs is not supported, because the prompt has no log probabilities."
                " Remove one of them.",
                "echo",
            )

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts."""
        return self.prompt  # type: ignore[return-value]  # as `_prompts` returns them


class Usage(BaseModel):
    """Number of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One completion, or the next token of one in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    ee: EEOutput | EEChunk | EEClamped | None = None
    """Only with `ee.return_exits`, or if the operator's limits have changed the request; a chunk
    before the last has only exits and confidences."""


class ResponseHeader(BaseModel):
    """What all responses and chunks of their streams have in common."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class CompletionResponse(ResponseHeader):
    """Response of `/v1/completions`, or a chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None
