"""Descriptions of the server's model, and bodies of `/tokenize` and `/detokenize` as in vLLM."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ee_llm.inference.llm import LLM
from ee_llm.inference.strategies import STRATEGIES, Strategy
from ee_llm.serving.protocol.ee import EEPolicy, ee_policy

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


class ModelExits(BaseModel):
    """What a client must know about a model to choose exits."""

    num_layers: int
    exits: list[int]
    """Boundaries of the early exits: the number of layers before each."""

    policy: EEPolicy
    """Exit policy of requests without thresholds."""

    strategies: list[Strategy]
    """Strategies that the model has exits for."""

    has_chat_template: bool


class Model(BaseModel):
    """A model that the server has."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "ee_llm"
    root: str
    max_model_len: int
    ee: ModelExits


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


def model_exits(llm: LLM) -> ModelExits:
    """Return the description of a model's exits."""
    boundaries = llm.config.exits.boundaries
    needs_exits = ("self-speculative",)
    return ModelExits(
        num_layers=llm.config.model.num_layers,
        exits=list(boundaries),
        policy=ee_policy(llm.policy),
        strategies=[one for one in STRATEGIES if boundaries or one not in needs_exits],
        has_chat_template=llm.encoder.has_chat_template,
    )
