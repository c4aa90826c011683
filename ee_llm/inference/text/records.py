"""Generations as JSON objects, and back: what `generate` writes and `verify` reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from ee_llm import distributed
from ee_llm.errors import RequestError
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.request import FinishReason, Request
from ee_llm.inference.sampling.sampler import SamplingParams
from ee_llm.inference.speed import Speed
from ee_llm.inference.strategies import STRATEGIES
from ee_llm.inference.text.json_lines import short
from ee_llm.inference.verification.reference_decoding import RequestOutput

Record = dict[str, Any]

# Of token ids and boundaries: what torch takes for an index.
_MAX_INTEGER = 2**31 - 1


def origin(prompt: str, request: Request, dtype: str, checkpoint: str, model: str) -> Record:
    """Return all that a generation is a function of, in JSON's own types.

    prompt: the text. dtype: what is computed in. checkpoint: the name of its directory. model: its
    fingerprint.
    """
    policy = request.policy.under(request.strategy)
    return {
        "prompt": prompt,
        "prompt_tokens": list(request.prompt),
        "strategy": request.strategy,
        "policy": {
            "measure": policy.measure,
            "thresholds": {str(b): policy.threshold(b) for b in policy.boundaries},
            "digest": policy.digest,
        },
        "sampling": asdict(request.sampling),
        "max_new_tokens": request.max_new_tokens,
        "stop": list(request.stop_strings),
        "eos_token_ids": list(request.eos_token_ids),
        "stop_token_ids": list(request.stop_tokens),
        "dtype": dtype,
        "checkpoint": checkpoint,
        "model": model,
    }


def to_record(
    origin: Mapping[str, Any],
    text: str,
    generation: RequestOutput,
    num_layers: int,
    pieces: Sequence[str] | None = None,
    id: str | None = None,
    speed: Speed | None = None,
) -> Record:
    """Return a generation, its texts and its `origin`, all of it JSON's own types.

    pieces: the text of each token. id: of the prompt among others. speed: how fast it was made.
    """
    return {
        **({} if id is None else {"id": id}),
        **origin,
        "text": text,
        "tokens": list(generation.tokens),
        **({} if pieces is None else {"pieces": list(pieces)}),
        "exits": list(generation.exits),
        "confidences": list(generation.confidences),
        "logprobs": list(generation.logprobs),
        "mean_depth": generation.mean_depth,
        "num_layers": num_layers,
        "finish_reason": generation.finish_reason,
        "num_drafted": generation.num_drafted,
        "num_accepted": generation.num_accepted,
        **({} if speed is None else {"speed": _speed(speed, generation)}),
    }


def error_record(id: str, message: str) -> Record:
    """Return what stands in a batch's output for a prompt that could not be continued."""
    return {"id": id, "error": {"message": message}}


def is_error(record: Mapping[str, Any]) -> bool:
    """Return whether a record is one of `error_record`'s."""
    return record.keys() == {"id", "error"}


def _speed(speed: Speed, generation: RequestOutput) -> Record:
    record: Record = {
        "time_to_first_token_s": speed.time_to_first_token_s,
        "tokens_per_second": speed.tokens_per_second,
    }
    if generation.strategy == "self-speculative":
        record["acceptance"] = speed.acceptance
        record["full_tokens_per_second"] = speed.full_tokens_per_second
        record["against_full"] = speed.against_full
    return record


def from_record(record: Mapping[str, Any], where: str) -> tuple[RequestOutput, str]:
    """Return the generation that `to_record` described, and the dtype it was made in.

    Raises RequestError, naming the place `where` it comes from, if something is missing or
    malformed.
    """
    if "quantize" in record:
        raise RequestError(
            f"{where} was generated with {short(record['quantize'])} weights, which are not the "
            "checkpoint's: there is nothing to hold it against"
        )
    try:
        tokens = _integers(record, "tokens")
        policy = _policy(record["policy"])
        generation = RequestOutput(
            prompt=_integers(record, "prompt_tokens"),
            tokens=tokens,
            exits=_integers(record, "exits", len(tokens)),
            confidences=_numbers(record, "confidences", len(tokens)),
            logprobs=_numbers(record, "logprobs", len(tokens)),
            finish_reason=_one_of(record, "finish_reason", get_args(FinishReason)),
            policy=policy,
            sampling=_sampling(record["sampling"]),
            strategy=_one_of(record, "strategy", STRATEGIES),
            num_drafted=_integer(record, "num_drafted"),
            num_accepted=_integer(record, "num_accepted"),
        )
        return generation, _one_of(record, "dtype", tuple(distributed.DTYPES))
    except KeyError as error:
        name = short(error.args[0])
        raise RequestError(f"{where} has no {name}: is it from 'ee-llm generate'?") from None
    except (TypeError, AttributeError, OverflowError) as error:
        raise RequestError(f"{where} is no generation: {error}") from None
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from None


def difference(record: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    """Return the first key of `origin` in which a record is another's; None if there is none."""
    keys = [*origin, "quantize"]  # which only records of such weights have
    return next((key for key in keys if record.get(key) != origin.get(key)), None)


def as_json(record: Record) -> str:
    """Return a record as one line of ASCII."""
    return json.dumps(record, allow_nan=False)


def _policy(record: Mapping[str, Any]) -> ExitPolicy:
    thresholds = {int(b): value for b, value in record["thresholds"].items()}
    policy = ExitPolicy(tuple(thresholds), tuple(thresholds.values()), record["measure"])
    if record["digest"] != policy.digest:
        raise RequestError(f"the policy's digest is {short(record['digest'])}, not {policy.digest}")
    return policy


def _sampling(record: Mapping[str, Any]) -> SamplingParams:
    usual = asdict(SamplingParams())
    for name, value in usual.items():
        types = (int,) if type(value) is int else (int, float)
        if type(record[name]) not in types:
            raise TypeError(f"{name!r} is {short(record[name])}")
    return SamplingParams(**{name: type(usual[name])(value) for name, value in record.items()})


def _integer(record: Mapping[str, Any], name: str) -> int:
    value = record[name]
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise TypeError(f"{name!r} is {short(value)}, no count")
    return value


def _integers(record: Mapping[str, Any], name: str, length: int | None = None) -> tuple[int, ...]:
    values = _list(record, name, length)
    if not all(type(value) is int and 0 <= value <= _MAX_INTEGER for value in values):
        raise TypeError(f"{name!r} has others than whole numbers of 0 to {_MAX_INTEGER}")
    return tuple(values)


def _numbers(record: Mapping[str, Any], name: str, length: int) -> tuple[float, ...]:
    values = _list(record, name, length)
    if not all(type(value) in (int, float) for value in values):
        raise TypeError(f"{name!r} has others than numbers")
    return tuple(map(float, values))


def _list(record: Mapping[str, Any], name: str, length: int | None) -> list[Any]:
    values = record[name]
    if not isinstance(values, list):
        raise TypeError(f"{name!r} is no list")
    if not values or (length is not None and len(values) != length):
        raise TypeError(f"{name!r} has {len(values)} entries, not {length or 'at least one'}")
    return values


def _one_of(record: Mapping[str, Any], name: str, choices: Sequence[str]) -> Any:
    if record[name] not in choices:
        raise TypeError(f"{name!r} is {short(record[name])}, none of {', '.join(choices)}")
    return record[name]
