"""Run the HTTP server: its socket, its signals, and its orderly end."""

import asyncio
import ipaddress
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from ee_llm.errors import RunError, UserError
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.llm import LLM
from ee_llm.serving.app import create_app
from ee_llm.serving.async_llm import MAX_UNREAD_TOKENS, AsyncLLM
from ee_llm.serving.middleware import LOCAL_HOSTS
from ee_llm.serving.service import Service
from ee_llm.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_REPEAT_S = 1.0  # Launchers may deliver one request to stop twice.
_ABORT_S = 5.0  # for the engine's step to end after a second signal
_CLOSE_S = 5  # for the last bytes of responses to reach their clients
_MAX_HEADER_BYTES = 64 * 1024


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address but does not listen yet.

    Raises UserError if that is not possible.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host} is not an address of this machine: {error}. Use 127.0.0.1 for this"
            " machine only, or 0.0.0.0 for all networks."
        ) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"--host {host} --port {port} cannot be used: {error.strerror or error}. Use another"
            " --port, or 0 for any free one."
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    """Return whether only programs of this machine can reach a socket."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def allowed_hosts(bound: socket.socket, host: str, settings: ServerSettings) -> tuple[str, ...]:
    """Return the hosts that requests may name, empty for any; see `RequestGate`.

    Args:
        bound: Socket of the server.
        host: What the user calls its address.
        settings: Settings of the server.
    """
    if settings.api_keys or not is_loopback(bound):
        return ()
    return (*LOCAL_HOSTS, f"[{host}]" if ":" in host else host)


def serve(
    llm: LLM,
    settings: ServerSettings,
    bound: socket.socket,
    *,
    host: str = "127.0.0.1",
    drain_timeout_s: float = 30.0,
    max_unread_tokens: int = MAX_UNREAD_TOKENS,
    on_ready: Callable[[ExitPolicy], None] = lambda policy: None,
) -> None:
    """Serve a model until a signal asks to stop.

    After SIGTERM or SIGINT, new requests get status 503 and running ones are finished. A second
    signal aborts them. If the engine's step does not end then, the process exits with status 1.

    Args:
        llm: The model, which stays open.
        settings: What the server allows.
        bound: Socket to listen on.
        host: Address of the socket as the user calls it, which requests may use.
        drain_timeout_s: Maximum number of seconds to finish running requests.
        max_unread_tokens: See `AsyncLLM`.
        on_ready: Called once the server takes requests, with the exit policy of those without one.

    Raises:
        RunError: The engine has failed.
    """
    if not is_loopback(bound) and not settings.api_keys:
        logger.warning(
            "The server listens on %s without API keys, so everybody who can reach it can use the"
            " model. Give --api-key-file, or use --host 127.0.0.1.",
            url_of(bound),
        )
    hosts = allowed_hosts(bound, host, settings)
    asyncio.run(_serve(llm, settings, bound, hosts, drain_timeout_s, max_unread_tokens, on_ready))


async def _serve(
    llm: LLM,
    settings: ServerSettings,
    bound: socket.socket,
    hosts: tuple[str, ...],
    drain_timeout_s: float,
    max_unread_tokens: int,
    on_ready: Callable[[ExitPolicy], None],
) -> None:
    async with AsyncLLM(llm, max_unread_tokens=max_unread_tokens) as engine:
        service = Service(engine, settings)
        config = uvicorn.Config(
            create_app(service, hosts),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        server = _Server(config)
        supervisor = asyncio.create_task(_supervise(server, service, drain_timeout_s, on_ready))
        try:
            await server.serve(sockets=[bound])
            await supervisor
        finally:
            supervisor.cancel()
            service.close()


class _Server(uvicorn.Server):
    """A server that counts signals instead of ending at the first one."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.num_signals = 0
        self._signalled_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal that asks to stop."""
        if self.num_signals == 0 or time.monotonic() - self._signalled_at > _REPEAT_S:
            self.num_signals += 1
            self._signalled_at = time.monotonic()


async def _supervise(
    server: _Server,
    service: Service,
    drain_timeout_s: float,
    on_ready: Callable[[ExitPolicy], None],
) -> None:
    """End the server after a signal, once its requests are finished, or if the engine fails."""
    try:
        while not server.started:
            await asyncio.sleep(_POLL_S / 10)
        on_ready(service.gatekeeper.policy)
        while server.num_signals == 0 and service.engine.error is None:
            service.gatekeeper.refresh()
            await asyncio.sleep(_POLL_S)
        service.is_draining = server.num_signals > 0
        await _check(service)
        logger.info(
            "Stopping: %d sequences are finished first, for at most %g s. Repeat the signal to"
            " abort them.",
            service.admission.num_sequences,
            drain_timeout_s,
        )
        end = time.monotonic() + drain_timeout_s
        while service.admission.num_requests and server.num_signals == 1:
            if time.monotonic() > end:
                logger.warning("The time to finish requests is over; they are aborted.")
                break
            await asyncio.sleep(_POLL_S)
        await _close(server, service)  # Streams end with an error.
        await _check(service)
    finally:
        server.force_exit = server.num_signals > 1
        server.should_exit = True


async def _check(service: Service) -> None:
    """Raise RunError if the engine has failed, once responses could tell that."""
    if service.has_failed:
        await asyncio.sleep(_POLL_S)
        raise RunError("The engine has failed. The log above has the reason.")


async def _close(server: _Server, service: Service) -> None:
    """Close the engine; end the process if its step hangs, which nothing else can end."""
    closing = asyncio.create_task(service.engine.close())
    num_signals, started = server.num_signals, time.monotonic()
    while not closing.done():
        # The second signal came before the close, or comes during it.
        is_urgent = server.num_signals > 1 and time.monotonic() - started > _ABORT_S
        if is_urgent or server.num_signals > num_signals:
            _exit(f"The engine's step has not ended for {service.engine.seconds_in_step:.0f} s.")
        await asyncio.sleep(_POLL_S)
    if (error := closing.exception()) is not None:
        _exit(str(error))


def _exit(reason: str) -> None:
    """End the process, with status 1, although a thread of it cannot be ended."""
    logger.error("%s The process exits without its end.", reason)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(1)
