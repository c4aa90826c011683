"""Run an engine in a thread of its own, for programs that use asyncio."""

import asyncio
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, Self

from ee_llm.errors import RequestError, RunError
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.outputs import RequestOutput, StepOutput, TokenOutput
from ee_llm.inference.request import Request
from ee_llm.inference.stream import StepTexts
from ee_llm.inference.text.detokenizer import Detokenize

logger = logging.getLogger(__name__)

CLOSED = "The engine was closed."
"""Value of `AsyncEngine.error` after its end without a failure."""

_JOIN_S = 60.0  # for the step in progress to end when the engine is closed


class StreamObserver(Protocol):
    """What gets to know how a request gets on, in the event loop of its stream."""

    def received(self, step: StepOutput) -> None:
        """A step has come from the engine; nobody has read it yet."""

    def ended(self) -> None:
        """The request is finished, has failed or is aborted; its tokens may be unread.

        This may be called more than once.
        """


class AsyncTokenStream(AsyncIterator[TokenOutput]):
    """An asynchronous iterator over the tokens of a request, as `TokenStream` is for threads.

    The request is aborted if the reading task is cancelled, or the stream is closed, left as an
    asynchronous context manager, or garbage-collected before its end. One task at a time may read
    it. If the request fails, or someone else aborts it, the iterator raises RunError after the last
    token.

    Attributes:
        request: The request.
        output: The finished output; None before the end.
    """

    def __init__(
        self,
        engine: "AsyncEngine",
        request: Request,
        prompt: str,
        detokenize: Detokenize,
        max_unread_tokens: int,
        observer: StreamObserver | None = None,
    ) -> None:
        self.request = request
        self.output: RequestOutput | None = None
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._texts = StepTexts(request, prompt, detokenize)
        self._max_unread = max_unread_tokens
        self._observer = observer
        self._num_unread = 0
        self._steps: deque[StepOutput] = deque()
        self._tokens: deque[TokenOutput] = deque()
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._is_over = False

    async def __anext__(self) -> TokenOutput:
        while not self._tokens:
            if self._steps:
                self._take(self._steps.popleft())
            elif self._error is not None:
                error, self._error = self._error, None
                self._is_over = True
                raise error
            elif self._is_over:
                raise StopAsyncIteration
            else:
                self._changed.clear()
                try:
                    await self._changed.wait()
                except asyncio.CancelledError:
                    self.close()
                    raise
        self._num_unread -= 1
        return self._tokens.popleft()

    def close(self) -> None:
        """Abort the request unless it is finished, and drop tokens that were not read."""
        self._steps.clear()
        self._tokens.clear()
        self._error = None
        self._is_over = True
        self._abort()
        self._has_ended()
        self._changed.set()

    async def aclose(self) -> None:
        """Close the stream, as `contextlib.aclosing` does."""
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        if self.output is None:
            self._engine.abort(self.request)

    def _has_ended(self) -> None:
        if self._observer is not None:
            self._observer.ended()

    def _take(self, step: StepOutput) -> None:
        """Move the tokens of a step to the tokens that can be read."""
        try:
            self._tokens.extend(self._texts.add(step))
        except BaseException:  # The tokenizer cannot decode a token.
            self.close()
            raise
        self.output = self._texts.output
        if self.output is not None:
            self._is_over = True
            if self.output.error is not None:
                self._error = RunError(self.output.error)

    def _receive(self, step: StepOutput) -> None:
        """Take a step from the engine; called in the event loop of the stream."""
        if self._is_over:
            return
        if self._observer is not None:
            self._observer.received(step)
        self._steps.append(step)
        self._num_unread += len(step.tokens)
        if step.request_output is not None:
            self._has_ended()
        if self._num_unread > self._max_unread:
            self.close()
            self._error = RunError(
                f"Request {self.request.id!r} was aborted: {self._num_unread} of its tokens were"
                f" unread, more than max_unread_tokens = {self._max_unread}."
            )
        self._changed.set()

    def _fail(self, error: Exception) -> None:
        """End the stream with an error after the tokens received so far."""
        if not self._is_over and not any(step.request_output for step in self._steps):
            self._error = error
        self._has_ended()
        self._changed.set()


class AsyncEngine:
    """A thread that runs the steps of an engine, and the streams of its requests.

    Methods may be called from any thread, and streams belong to the event loop that submitted them.
    The thread sleeps while there are no requests. If a step raises an exception, all streams end
    with an error at once and no further requests are accepted.

    Attributes:
        error: Why the engine has failed or was closed; None while it works.
    """

    def __init__(self, engine: EngineBase, detokenize: Detokenize, max_unread_tokens: int) -> None:
        """Start the thread.

        Args:
            engine: The engine. Its method `step` belongs to the thread.
            detokenize: Function from token ids to text.
            max_unread_tokens: A request is aborted if its stream has more unread tokens.
        """
        self.error: str | None = None
        self._engine = engine
        self._detokenize = detokenize
        self._max_unread = max_unread_tokens
        self._wake = threading.Condition(threading.RLock())  # __del__ may run anywhere.
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[str, _Delivery] = {}
        self._step_started: float | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="ee_llm engine", daemon=True)
        self._thread.start()

    @property
    def seconds_in_step(self) -> float:
        """For how many seconds the current step has been running; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    async def submit(
        self, request: Request, prompt: str, observer: StreamObserver | None = None
    ) -> AsyncTokenStream:
        """Queue a request and return its stream.

        Args:
            request: The request. Its id must be unique among the unfinished requests.
            prompt: Text of its prompt.
            observer: Gets to know how the request gets on.

        Raises:
            RequestError: The engine cannot serve the request.
            RunError: The engine has failed or is closed.
        """
        self._engine.check(request)
        stream = AsyncTokenStream(
            self, request, prompt, self._detokenize, self._max_unread, observer
        )
        accepted: Future[None] = Future()
        delivery = _Delivery(stream)
        self._command(lambda: self._add(request, delivery, accepted))
        try:
            await asyncio.wrap_future(accepted)
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, request: Request) -> None:
        """Abort a request before the next step, unless it is finished."""
        self._command(lambda: self._abort(request))

    def close(self) -> None:
        """Abort all requests and end the thread; waits for the step in progress.

        Raises RunError if the step does not end.
        """
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if threading.current_thread() is self._thread:  # Garbage is collected in any thread.
            return
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise RunError(
                f"The engine's step has not ended for {self.seconds_in_step:.0f} s. End the process"
                " to stop it."
            )

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self.error is None:
                self._commands.append(command)
                self._wake.notify()
                return
        command()  # The thread has ended, or is about to.

    def _run(self) -> None:
        reason = CLOSED
        try:
            while self._wait_for_work():
                self._execute_commands()
                self._step()
        except RunError as error:
            reason = f"The engine failed: {error}"
            logger.error(reason)
        except BaseException as error:
            reason = f"The engine failed: {type(error).__name__}: {error}"
            logger.exception("The engine failed.")
        with self._wake:
            self.error = reason  # From now on, nobody adds commands.
        self._step_started = None
        self._execute_commands()
        streams = list(self._streams.values())
        self._end_all(reason)
        for delivery in streams:
            with suppress(RequestError):
                self._engine.abort(delivery.request.id)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; return False if the engine is to be closed."""
        with self._wake:
            while not (
                self._is_closing or self._commands or self._streams or self._engine.has_work
            ):
                self._wake.wait()
            return not self._is_closing

    def _step(self) -> None:
        had_work = self._engine.has_work
        self._step_started = time.monotonic()
        outputs = self._engine.step()
        self._step_started = None
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Delivery, StepOutput]]] = {}
        for output in outputs:
            delivery = self._streams.get(output.request_id)
            if delivery is not None:
                by_loop.setdefault(delivery.loop, []).append((delivery, output))
                if output.request_output is not None:
                    del self._streams[output.request_id]
        for loop, received in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, received)
            except RuntimeError:  # The event loop is closed, so nobody reads the streams.
                for delivery, _ in received:
                    self._abort(delivery.request)
        if not had_work and not outputs:  # Someone else has aborted them, as `LLM.close` does.
            self._end_all("The request was aborted before its end.")

    def _execute_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _add(self, request: Request, delivery: "_Delivery", accepted: "Future[None]") -> None:
        if not accepted.set_running_or_notify_cancel():
            return
        try:
            if self.error is not None:
                raise RunError(self.error)
            self._engine.add(request)
        except Exception as error:
            accepted.set_exception(error)
        else:
            self._streams[request.id] = delivery
            accepted.set_result(None)

    def _abort(self, request: Request) -> None:
        delivery = self._streams.get(request.id)
        if delivery is not None and delivery.request is request:
            self._streams.pop(request.id, None)
            with suppress(RequestError):  # It is finished.
                self._engine.abort(request.id)

    def _end_all(self, reason: str) -> None:
        for delivery in list(self._streams.values()):
            with suppress(RuntimeError):  # The event loop is closed.
                delivery.loop.call_soon_threadsafe(delivery.fail, RunError(reason))
        self._streams.clear()


class _Delivery:
    """The way to a stream, which does not keep the stream alive."""

    def __init__(self, stream: AsyncTokenStream) -> None:
        self.request = stream.request
        self.loop = stream._loop
        self._stream = weakref.ref(stream)

    def receive(self, step: StepOutput) -> None:
        stream = self._stream()
        if stream is not None:
            stream._receive(step)

    def fail(self, error: Exception) -> None:
        stream = self._stream()
        if stream is not None:
            stream._fail(error)


def _deliver(received: list[tuple[_Delivery, StepOutput]]) -> None:
    for delivery, output in received:
        delivery.receive(output)
