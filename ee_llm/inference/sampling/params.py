"""Sampling parameters: how tokens are drawn and when a generation ends."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.inference.sampling.plain_numbers import plain_float, plain_int

MAX_LOGPROBS = 20
_COUNTS = {"n": 1, "max_tokens": 1, "min_tokens": 0, "top_k": 0}  # and their least values


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a generation ends, with the parameter names of vLLM.

    They apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Three defaults differ from those of vLLM: `temperature` is 0 (greedy) instead of 1, `max_tokens`
    is 64 instead of 16, and `seed` is 0 instead of a random one. Equal prompts with equal
    parameters therefore get equal texts. To draw several texts, use `n` or different seeds.

    Attributes:
        n: Number of samples of each prompt. Sample i > 0 uses a seed derived from (`seed`, i).
        temperature: Divisor of the logits. 0, the default, selects the most probable token (the
            one with the lowest id if several are equal).
        top_k: Draw from the k most probable tokens only; 0 or -1 for all.
        top_p: Draw from the smallest set of most probable tokens whose probabilities add up to at
            least this; 1 for all.
        min_p: Draw from tokens with at least this share of the highest probability; 0 for all
            (arXiv 2407.01082).
        repetition_penalty: Divisor of the positive logits, and factor of the negative logits, of
            tokens that occur in the prompt or the output so far (CTRL, arXiv 1909.05858, section
            4.1); 1 is off. It also applies to greedy decoding.
        seed: Seed of the noise, 0 to 2**63 - 1; not None. The same seed gives the same tokens.
        max_tokens: Maximum number of generated tokens.
        min_tokens: Minimum number of generated tokens. Before it, end and stop tokens are not
            drawn, and stop strings have no effect.
        stop: A string or strings at which a generation ends; None for none. The output does not
            contain them.
        stop_token_ids: Tokens at which a generation ends, besides the model's own end tokens; None
            for none. An engine refuses ids outside the model's vocabulary.
        ignore_eos: Do not end at the model's own end tokens.
        logprobs: Number of most probable tokens, at most 20, to report with their log
            probabilities for each position; None for none. They are those of the token's own exit.

    Raises:
        RequestError: A value is not allowed.
    """

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 64
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        for name, least in _COUNTS.items():
            given = getattr(self, name)
            value = plain_int(given)
            if name == "top_k" and value == -1:  # "no limit" of vLLM
                value = 0
            if value is None or value < least:
                raise RequestError(f"{name} = {given!r} must be an integer of at least {least}")
            object.__setattr__(self, name, value)
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens = {self.min_tokens} is above max_tokens = {self.max_tokens}. Lower it."
            )
        seed = plain_int(self.seed)
        if seed is None or not 0 <= seed < 2**63:
            raise RequestError(f"seed = {self.seed!r} must be an integer from 0 to 2**63 - 1")
        object.__setattr__(self, "seed", seed)
        if type(self.ignore_eos) is not bool:
            raise RequestError(f"ignore_eos = {self.ignore_eos!r} must be True or False")
        if self.logprobs is not None:
            logprobs = plain_int(self.logprobs)
            if logprobs is None or not 0 <= logprobs <= MAX_LOGPROBS:
                raise RequestError(
                    f"logprobs = {self.logprobs!r} must be an integer from 0 to {MAX_LOGPROBS}, or"
                    " None"
                )
            object.__setattr__(self, "logprobs", logprobs)
        self._check_floats()

    def _check_floats(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = plain_float(getattr(self, name))
            if value is None:
                raise RequestError(f"{name} = {getattr(self, name)!r} must be a number")
            object.__setattr__(self, name, value)
        if not 0.0 <= self.temperature < math.inf:  # NaN fails too
            raise RequestError(
                f"temperature = {self.temperature} must be finite and at least 0 (0 is greedy)"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p = {self.top_p} is not in (0, 1]; 1 means no limit")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p = {self.min_p} is not in [0, 1]; 0 means no limit")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise RequestError(
                f"repetition_penalty = {self.repetition_penalty} must be finite and above 0 (1 is"
                " off, above 1 discourages repetition)"
            )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is always the one with the largest logit."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0

    def banned_token_ids(
        self, index: int, eos_token_ids: Iterable[int], vocab_size: int
    ) -> tuple[int, ...]:
        """Return the ids that generated token `index` (from 0) must not have; see `min_tokens`.

        Ids outside the vocabulary are omitted, because no logit belongs to them.
        """
        if index >= self.min_tokens:
            return ()
        eos = () if self.ignore_eos else eos_token_ids
        ids = {*eos, *self.stop_token_ids}
        return tuple(sorted(token for token in ids if 0 <= token < vocab_size))

    def samples(self) -> tuple["SamplingParams", ...]:
        """Return parameters with `n` = 1 and a distinct seed for each of the `n` samples."""
        return tuple(map(self.sample, range(self.n)))

    def sample(self, index: int) -> "SamplingParams":
        """Return parameters with `n` = 1 and the seed of a sample, which is `seed` for index 0."""
        # The odd multiplier of a 64-bit linear congruential generator (Steele and Vigna 2021).
        return replace(self, n=1, seed=(self.seed + index * 0xD1342543DE82EF95) % 2**63)

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON's own types."""
        return asdict(self) | {
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
        }


def _strings(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, Iterable):
        raise RequestError(f"stop = {value!r} must be a string or a list of strings")
    strings = (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"stop = {value!r}: {string!r} is not a string of characters")
    return strings


def _token_ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if (single := plain_int(value)) is not None:
        value = [single]
    if not isinstance(value, Iterable):
        raise RequestError(f"stop_token_ids = {value!r} must be a list of token ids")
    ids: list[int] = []
    for token in value:
        id = plain_int(token)
        if id is None or id < 0:
            raise RequestError(f"stop_token_ids = {value!r}: {token!r} is not a token id")
        ids.append(id)
    return tuple(ids)
