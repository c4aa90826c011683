"""Parsing and validation of JSON files that a checkpoint contains."""

import json
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ee_llm.errors import CheckpointError


class StrictModel(BaseModel):
    """A schema without conversions: "5" is not an integer, and True is not one either."""

    model_config = ConfigDict(strict=True)


Model = TypeVar("Model", bound=StrictModel)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in `content`, read from `path`; raises CheckpointError."""
    try:
        parsed = json.loads(content.decode("utf-8"), parse_int=_int64)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def validate(schema: type[Model], content: Any, path: Path) -> Model:
    """Return `content`, read from `path`, as a model; raises CheckpointError naming the field."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {reprlib.repr(first['input'])}"
        raise CheckpointError(f"{path}: {name}: {first['msg']}{found}") from None


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise CheckpointError(f"an integer of {len(digits)} digits does not fit in 64 bits")
    return int(digits)
