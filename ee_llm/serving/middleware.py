"""What happens before every request: its id, and the check of its API key."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ee_llm.serving.api_keys import ApiKeys
from ee_llm.serving.page.routes import PAGE_PATHS
from ee_llm.serving.protocol.errors import ApiError

OPEN_PATHS = ("/health", "/live", "/ready", *PAGE_PATHS)
"""Paths that need no API key: probes and the page, which tell nothing about the model."""


class RequestGate:
    """ASGI middleware: gives each request an id, and refuses those without a valid API key.

    The id is that of the header x-request-id if it has one that is safe to log, else a new one. It
    is in the state of the request as `request_id`, and in the response's header. The state also has
    a digest of the API key as `key_id`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        authorization = headers.get("authorization", "")
        allowed = scope["path"] in OPEN_PATHS or self._keys.allow(authorization)
        scope["state"]["key_id"] = self._keys.key_id(authorization) if allowed else None
        app = self._app if allowed else error_response(_UNAUTHORIZED)
        await app(scope, receive, send_with_id)


def error_response(error: ApiError) -> JSONResponse:
    """Return the response for an error."""
    return JSONResponse(error.body, error.status, error.headers)


_UNAUTHORIZED = ApiError(
    401,
    "The request has no valid API key. Send the header 'Authorization: Bearer KEY' with a key of"
    " this server.",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)
