"""Requests and responses of `/tokenize` and `/detokenize`, which have the format of vLLM's."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MAX_TOKENS = 2**20


class TokenizeRequest(BaseModel):
    """Body of `/tokenize`: a prompt or a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    """Add the beginning-of-sequence token to a prompt if the model's settings ask for it."""
    return_token_strs: bool = False
    """Return the text of each token as well."""

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class TokenizeResponse(BaseModel):
    """Token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(BaseModel):
    """Body of `/detokenize`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MAX_TOKENS)]


class DetokenizeResponse(BaseModel):
    """Text of token ids."""

    prompt: str


class Model(BaseModel):
    """A model that the server has."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "ee_llm"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """All models of the server."""

    object: str = "list"
    data: list[Model]


class Version(BaseModel):
    """Version of ee_llm."""

    version: str


class Health(BaseModel):
    """State of the server."""

    status: str
