"""Read the body of a request: JSON of limited size and depth."""

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.errors import RequestError
from ee_llm.inference.text.json_lines import parse
from ee_llm.serving.limits import Reservation
from ee_llm.serving.protocol.errors import ApiError, bad_request, from_validation

MAX_DEPTH = 64
"""Maximum depth of nested objects and lists in a body."""

_Body = TypeVar("_Body", bound=BaseModel)


def check_headers(request: Request, max_bytes: int) -> None:
    """Raise ApiError if the body is declared as too large, or not as JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Browsers send other types to a local server without asking it first.
        raise ApiError(
            415,
            f"The content type is {kind or 'missing'}. Send JSON with the header"
            " 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isascii() and declared.isdigit() else 0
    if size > max_bytes:
        raise _too_large(max_bytes)


async def read_body(
    request: Request,
    kind: type[_Body],
    max_bytes: int,
    timeout_s: float,
    reservation: Reservation,
) -> _Body:
    """Return the body of a request as a model; its reservation then has a share.

    Raises ApiError if it is too large (413), too slow (408) or not valid (400).
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                reservation.receive(len(part))
                parts.append(part)
    except TimeoutError:
        raise ApiError(
            408, f"The body was not complete after {timeout_s:g} s.", code="request_timeout"
        ) from None
    reservation.complete()
    return parse_body(b"".join(parts), kind)


def parse_body(data: bytes, kind: type[_Body]) -> _Body:
    """Return a body as a model; raises ApiError (400) if it is not valid."""
    try:
        value = parse(data, "The body")
    except RequestError as error:
        raise bad_request(str(error), None) from None
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.", None)
    for name, one in value.items():
        _check(name, one)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, value) from None


def _check(name: str, value: Any) -> None:
    """Raise ApiError if a value is nested too deeply, or has a text with an unpaired surrogate."""
    level = [name, value]
    for _ in range(MAX_DEPTH):
        for one in level:
            if isinstance(one, str) and not is_encodable(one):
                where = name if is_encodable(name) else None
                raise bad_request(
                    f"{where or 'A name'} has an unpaired surrogate, which is not valid Unicode"
                    " text. Send complete characters.",
                    where,
                )
        nested = [one for one in level if isinstance(one, dict | list)]
        if not nested:
            return
        level = []
        for one in nested:
            level += [*one, *one.values()] if isinstance(one, dict) else one
    raise bad_request(f"{name} is nested too deeply: more than {MAX_DEPTH} levels.", name)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {max_bytes} bytes. Shorten the request.",
        code="body_too_large",
    )
