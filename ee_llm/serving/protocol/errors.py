"""Errors in the format of OpenAI's API."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ee_llm.inference.text.json_lines import short

# The type of an error by HTTP status, as in OpenAI's API.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


# Words in the engine's errors, and the fields of requests that they are about.
_PARAMS = {
    "min_tokens = ": "min_tokens",
    "stop_token_ids": "stop_token_ids",
    "Lower max_tokens": "max_tokens",
    "draft_length": "ee.draft_length",
    "draft_threshold": "ee.draft_threshold",
    "draft_": "ee.draft_exit",
    "measure = ": "ee.measure",
    "strategy": "ee.strategy",
    "exits": "ee.thresholds",
}


class ApiError(Exception):
    """A request that gets an error as its response.

    Attributes:
        status: HTTP status.
        message: What is wrong, and what to do.
        param: Name of the wrong parameter; None if no parameter is wrong.
        code: Machine-readable reason; None if the status says everything.
        headers: Additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def event(self) -> str:
        """The body as an event of a stream."""
        return f"data: {json.dumps(self.body)}\n\n"


def bad_request(message: str, param: str | None) -> ApiError:
    """Return the error of a request that is not valid (status 400)."""
    return ApiError(400, message, param=param, code="invalid_value")


def engine_refusal(error: Exception, default: str) -> ApiError:
    """Return the error (status 400) of a request that the engine refuses.

    Args:
        error: The engine's error. Its message says which parameter is wrong.
        default: Parameter that messages without the name of a parameter are about.
    """
    message = str(error)
    if "more than model.max_seq_length" in message:
        return ApiError(400, message, param=default, code="context_length_exceeded")
    param = next((param for word, param in _PARAMS.items() if word in message), default)
    return bad_request(message, param)


def from_validation(error: ValidationError, body: Any) -> ApiError:
    """Return the error of a body that does not have the fields of a request model."""
    problems = error.errors(include_url=False, include_context=False)
    # Of a value that may have several types, each has a problem: report the most specific ones.
    paths = [_path(problem, body) for problem in problems]
    deepest = max((path for path in paths if path[:1] == paths[0][:1]), key=len)
    found = [one for one, path in zip(problems, paths, strict=True) if path == deepest]
    param, kind = ".".join(map(str, deepest)) or None, found[0]["type"]
    if kind == "missing":
        return bad_request(f"{param} is missing.", param)
    if kind == "extra_forbidden":
        return bad_request(f"{param} is unknown. Check its spelling, or remove it.", param)
    texts = dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in found)
    where = "The body" if param is None else f"{param} = {short(found[0]['input'])}"
    return bad_request(f"{where}: {', or '.join(texts)}.", param)


def _path(problem: Mapping[str, Any], body: Any) -> list[int | str]:
    """Return the location of a problem without parts that name types instead of fields."""
    location: Sequence[int | str] = problem["loc"]
    path: list[int | str] = []
    for part in location:
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            if problem["type"] != "missing" or part != location[-1]:
                continue
        path.append(part)
    return path
