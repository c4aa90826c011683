"""What happens before every request: its id, and the checks of its host and its API key."""

import re
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ee_llm.serving.api_keys import ApiKeys
from ee_llm.serving.page.routes import PAGE_PATHS
from ee_llm.serving.protocol.errors import ApiError

OPEN_PATHS = ("/health", "/live", "/ready", *PAGE_PATHS)
"""Paths that need no API key: probes and the page, which tell nothing about the model."""


LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine, as in the header Host."""


class RequestGate:
    """ASGI middleware: gives each request an id, and refuses those that are not allowed.

    Without API keys, a web page could read from a server of this machine by giving its own name the
    address 127.0.0.1 (DNS rebinding). Its requests then have the name of the page as their host.

    The id is that of the header x-request-id if it has one that is safe to log, else a new one. It
    is in the state of the request as `request_id`, and in the response's header. The state also has
    a digest of the API key as `key_id`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, hosts: Collection[str] = ()) -> None:
        """Wrap an application.

        Args:
            app: The application.
            keys: The API keys.
            hosts: Hosts without port that requests may name, as in the header Host; empty for any.
        """
        self._app = app
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in hosts)

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
        host = re.sub(r":[0-9]*$", "", headers.get("host", "")).lower()
        app = self._app if allowed else error_response(_UNAUTHORIZED)
        if self._hosts and host not in self._hosts:
            app = error_response(_foreign_host(host))
        await app(scope, receive, send_with_id)


def error_response(error: ApiError) -> JSONResponse:
    """Return the response for an error."""
    return JSONResponse(error.body, error.status, error.headers)


def _foreign_host(host: str) -> ApiError:
    return ApiError(
        403,
        f"The host {host[:100]!r} is not a name of this server, which has no API keys. Use"
        " 127.0.0.1 or localhost in the URL, or start the server with --api-key-file.",
        code="host_not_allowed",
    )


_UNAUTHORIZED = ApiError(
    401,
    "The request has no valid API key. Send the header 'Authorization: Bearer KEY' with a key of"
    " this server.",
    code="invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)
