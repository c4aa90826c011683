"""The fields that completions and chats have in common, and the sampling parameters they mean."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ee_llm.errors import RequestError
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.serving.protocol.ee import EEOptions
from ee_llm.serving.protocol.errors import bad_request, engine_refusal

MAX_CHOICES = 128
"""Maximum number of choices of one HTTP request, as in OpenAI's API."""

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1024  # strings, and characters of one

_RANDOM_SEEDS = 2**53  # JavaScript has no larger integers.

# Larger values overflow logits, and have no use.
_Factor = Annotated[float, Field(ge=0.01, le=100.0)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


def _or_default(value: Any) -> Any:
    return {} if value is None else value


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False
    """Send the usage in a last chunk without choices."""


class GenerationFields(BaseModel):
    """Fields of `/v1/completions` and `/v1/chat/completions`; null means the default."""

    # OpenAI's clients send fields that this server does not know.
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    # Fields that would change the output, with the values that do not.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "prompt_logprobs": (),
        "truncate_prompt_tokens": (),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: _Factor | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=_MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    ee: Annotated[EEOptions, BeforeValidator(_or_default)] = EEOptions()

    @property
    def num_samples(self) -> int:
        """Number of choices of each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        """Number of most probable tokens to report; None for no log probabilities."""
        raise NotImplementedError

    @property
    def token_limit(self) -> int | None:
        """Maximum number of tokens to generate; None for no limit but the context."""
        return self.max_tokens

    def check_supported(self) -> None:
        """Raise ApiError for known fields of OpenAI's and vLLM's API that this server lacks."""
        for name, neutral in self.unsupported.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise bad_request(
                    f"{name} is not supported by this server. Remove it from the request.", name
                )
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "stream_options needs stream = true. Remove it, or set stream.", "stream_options"
            )

    def sampling_params(self, max_tokens: int) -> SamplingParams:
        """Return the sampling parameters; without a seed, a random one.

        Args:
            max_tokens: Number of tokens to generate if the request does not say.

        Raises:
            ApiError: A value is not valid.
        """
        given = {
            "n": self.n,
            "max_tokens": self.token_limit,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }
        values: dict[str, Any] = {name: one for name, one in given.items() if one is not None}
        try:
            return SamplingParams(
                **{"max_tokens": max_tokens} | values,
                temperature=1.0 if self.temperature is None else self.temperature,
                seed=secrets.randbelow(_RANDOM_SEEDS) if self.seed is None else self.seed,
                logprobs=self.num_logprobs,
            )
        except RequestError as error:
            raise engine_refusal(error, "min_tokens") from None
