"""Check the values of results that were read from files."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ee_llm.errors import RequestError


def check_record(kind: type, values: Mapping[str, Any]) -> None:
    """Raise RequestError unless `values` are the fields of a dataclass, with their types.

    Numbers must be finite, and texts are not read as numbers. Other keys are ignored. The error
    names the first wrong field, such as `points[0].speedup`, and has no file and no remedy, which
    the caller knows.

    Args:
        kind: The dataclass.
        values: Its fields as values that JSON can represent.
    """
    try:
        text = json.dumps(dict(values), allow_nan=False)
    except ValueError as error:
        raise RequestError(f"it has a number that is not finite: {error}") from None
    try:
        _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])
        if first["type"] == "missing":
            raise RequestError(f"{name[1:]} is missing") from None
        shown = json.dumps(first["input"])
        shown = shown if len(shown) <= 40 else f"{shown[:40]}.."
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise RequestError(f"{name[1:]} = {shown}: {reason}") from None


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
