"""Generations as JSON objects, and back: what `generate` writes and `verify` reads."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ee_llm.inference.generator import Generation
from ee_llm.inference.policy import Policy
from ee_llm.inference.sampling import Sampling


def to_record(
    prompt: str,
    text: str,
    generation: Generation,
    num_layers: int,
    dtype: str,
    pieces: Sequence[str] | None = None,
    id: str | None = None,
) -> dict[str, Any]:
    """Return a generation, its texts and what it was made with, all of it JSON's own types.

    pieces: the text of each token. id: of the prompt among others. dtype: what it was computed in.
    """
    policy = generation.policy
    return {
        **({} if id is None else {"id": id}),
        "prompt": prompt,
        "text": text,
        "prompt_tokens": list(generation.prompt),
        "tokens": list(generation.tokens),
        **({} if pieces is None else {"pieces": list(pieces)}),
        "exits": list(generation.exits),
        "confidences": list(generation.confidences),
        "logprobs": list(generation.logprobs),
        "mean_depth": generation.mean_depth,
        "num_layers": num_layers,
        "finish_reason": generation.finish_reason,
        "strategy": generation.strategy,
        "num_drafted": generation.num_drafted,
        "num_accepted": generation.num_accepted,
        "policy": {
            "measure": policy.measure,
            "thresholds": {str(b): policy.threshold(b) for b in policy.boundaries},
            "digest": policy.digest,
        },
        "sampling": asdict(generation.sampling),
        "dtype": dtype,
    }


def from_record(record: Any, where: str) -> tuple[Generation, str]:
    """Return the generation that `to_record` described, and the dtype it was made in.

    Raises ValueError, naming the place `where` it comes from, if something is missing or malformed.
    """
    try:
        policy = record["policy"]
        thresholds = {int(b): value for b, value in policy["thresholds"].items()}
        generation = Generation(
            prompt=_integers(record["prompt_tokens"]),
            tokens=_integers(record["tokens"]),
            exits=_integers(record["exits"]),
            confidences=tuple(map(float, record["confidences"])),
            logprobs=tuple(map(float, record["logprobs"])),
            finish_reason=record["finish_reason"],
            policy=Policy(tuple(thresholds), tuple(thresholds.values()), policy["measure"]),
            sampling=Sampling(**record["sampling"]),
            strategy=record["strategy"],
        )
        return generation, str(record["dtype"])
    except KeyError as error:
        raise ValueError(
            f"{where} has no {error.args[0]!r}: is it from 'ee-llm generate'?"
        ) from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no generation: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def as_json(record: dict[str, Any]) -> str:
    """Return a record as one line of ASCII."""
    return json.dumps(record)


def _integers(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise TypeError("token ids and exits must be integers")
    return tuple(values)
