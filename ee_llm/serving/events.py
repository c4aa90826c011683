"""Responses that end when the client does: streams of server-sent events, and plain ones."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_GRACE_S = 5.0  # after the deadline, to send the last event to a slow client

_Result = TypeVar("_Result")


class ClientDisconnectedError(Exception):
    """The client has closed the connection before the response was complete."""


class EventStream(StreamingResponse):
    """A stream of server-sent events, which ends when the client disconnects."""

    def __init__(
        self, events: AsyncGenerator[str, None], deadline: float, on_close: Callable[[], None]
    ) -> None:
        """Respond with events.

        Args:
            events: The events. They end by the deadline, unless the client does not read them.
            deadline: Time of the event loop.
            on_close: Called when the response has ended in whatever way.
        """
        super().__init__(
            events,
            media_type="text/event-stream",
            # Proxies must not collect events.
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._events = events
        self._end = deadline + _GRACE_S
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            with contextlib.suppress(ClientDisconnectedError, OSError, TimeoutError):
                async with asyncio.timeout_at(self._end):
                    await until_disconnect(receive, self.stream_response(send))
        finally:
            self._on_close()
            await self._events.aclose()


async def until_disconnect(
    receive: Receive | Request, work: Coroutine[Any, Any, _Result]
) -> _Result:
    """Return the result of `work`, which is cancelled if the client disconnects.

    Args:
        receive: ASGI's function that returns messages of the client, or the request that has it.
        work: What to do.

    Raises:
        ClientDisconnectedError: The client has disconnected.
    """
    get = receive.receive if isinstance(receive, Request) else receive
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(get))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
