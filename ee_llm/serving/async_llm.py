"""Generate text with an early-exit model from asyncio: the class that servers use."""

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ee_llm.data.tokenization.chat_template import Message
from ee_llm.errors import RequestError, RunError
from ee_llm.inference.choices import Bos
from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.exits.policy import Exits
from ee_llm.inference.llm import LLM, Prompt
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from ee_llm.serving.async_engine import AsyncEngine, AsyncTokenStream, StreamObserver

MAX_UNREAD_TOKENS = 8192


class AsyncLLM:
    """An early-exit model for asyncio: `LLM` whose engine runs in a thread of its own.

    Requests of all tasks are decoded in common batches. A request is aborted between two steps if
    its task is cancelled or its stream is closed.

        async with ee_llm.AsyncLLM("runs/tuned", dtype="bfloat16") as llm:
            stream = await llm.stream("Once", ee_llm.SamplingParams(max_tokens=64))
            async for token in stream:
                print(token.text, end="", flush=True)
            print(stream.output.mean_depth)

    Attributes:
        llm: The model, with its configuration and tokenizer.
    """

    def __init__(
        self, model: LLM | str | Path, *, max_unread_tokens: int = MAX_UNREAD_TOKENS, **options: Any
    ) -> None:
        """Load a model and start its engine.

        Args:
            model: Checkpoint or run directory, as for `LLM`, or an `LLM`, which stays open when
                this object is closed.
            max_unread_tokens: A request is aborted if its stream has more tokens that were not
                read, so that a slow reader does not fill the memory.
            options: Further arguments of `LLM`.

        Raises:
            UserError: The model cannot be loaded, or this process is a worker rank, which calls
                `LLM.worker_loop` instead.
        """
        if type(max_unread_tokens) is not int or max_unread_tokens < 1:
            raise RequestError(f"max_unread_tokens = {max_unread_tokens!r} must be at least 1")
        if isinstance(model, LLM) and options:
            raise RequestError(
                f"{next(iter(options))} is an argument of LLM, which is loaded already. Remove it."
            )
        self._owns_model = not isinstance(model, LLM)
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        if not self.llm.is_leader:
            raise RequestError("This rank is a worker. Call worker_loop() of an LLM.")
        self._engine = AsyncEngine(self.llm.engine, self.llm.decode, max_unread_tokens)
        self._finalize = weakref.finalize(self, self._engine.close)

    @property
    def error(self) -> str | None:
        """Why the engine has failed or was closed; None while it works."""
        return self._engine.error

    @property
    def seconds_in_step(self) -> float:
        """For how many seconds the current step of the engine has been running; 0 if it is idle."""
        return self._engine.seconds_in_step

    async def generate(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        exits: Exits | None = None,
        strategy: Strategy | SelfSpeculation | Contrast = "exact",
        bos: Bos = "auto",
        parse_special: bool = False,
    ) -> list[RequestOutput]:
        """Return the `n` continuations of one prompt; see `LLM.generate`.

        A request that fails has the finish reason "error" and a message in `error`.

        Args:
            prompt: A text, token ids, or a conversation.
            sampling_params: See `LLM.generate`.
            exits: See `LLM.generate`.
            strategy: See `LLM.generate`.
            bos: See `LLM.generate`.
            parse_special: See `LLM.generate`.

        Raises:
            RequestError: The prompt or a parameter is not valid.
            RunError: The engine has failed or was closed.
        """
        encoded = await self._encode(prompt, bos, parse_special)
        params = sampling_params or SamplingParams()
        requests = [
            self.llm.make_request(encoded, sample, exits=exits, strategy=strategy)
            for sample in params.samples()
        ]
        streams: list[AsyncTokenStream] = []
        tasks: list[asyncio.Task[RequestOutput]] = []
        try:
            for request in requests:
                streams.append(await self.submit(request, encoded.text))
                tasks.append(asyncio.create_task(_finished(streams[-1])))
            outputs = await asyncio.gather(*tasks)
            return [replace(output, index=index) for index, output in enumerate(outputs)]
        finally:
            for task in tasks:
                task.cancel()
            for stream in streams:
                stream.close()

    async def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        exits: Exits | None = None,
        strategy: Strategy | SelfSpeculation | Contrast = "exact",
        bos: Bos = "auto",
        parse_special: bool = False,
    ) -> AsyncTokenStream:
        """Return an asynchronous iterator over the tokens of a continuation.

        Args:
            prompt: A text, token ids, or a conversation.
            sampling_params: See `LLM.generate`; n must be 1.
            exits: See `LLM.generate`.
            strategy: See `LLM.generate`.
            bos: See `LLM.generate`.
            parse_special: See `LLM.generate`.

        Raises:
            RequestError: The prompt or a parameter is not valid.
            RunError: The engine has failed or was closed.
        """
        encoded = await self._encode(prompt, bos, parse_special)
        params = sampling_params or SamplingParams()
        request = self.llm.make_request(encoded, params, exits=exits, strategy=strategy)
        return await self.submit(request, encoded.text)

    async def submit(
        self, request: Request, prompt: str, observer: StreamObserver | None = None
    ) -> AsyncTokenStream:
        """Queue a request of `LLM.make_request` and return the stream of its tokens.

        Args:
            request: The request.
            prompt: Text of its prompt.
            observer: Gets to know how the request gets on, also if nobody reads the stream.

        Raises:
            RequestError: The engine cannot serve the request, for example because its prompt is too
                long.
            RunError: The engine has failed or was closed.
        """
        return await self._engine.submit(request, prompt, observer)

    async def close(self) -> None:
        """Abort all requests and end the engine; free the model if this object has loaded it."""
        self._finalize.detach()
        await asyncio.to_thread(self._engine.close)
        if self._owns_model:
            await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _encode(
        self, prompt: Prompt | Sequence[Message], bos: Bos, parse_special: bool
    ) -> EncodedPrompt:
        # A long prompt would keep the event loop from serving other tasks.
        encode = self.llm.encode_prompt
        return await asyncio.to_thread(encode, prompt, bos=bos, parse_special=parse_special)


async def _finished(stream: AsyncTokenStream) -> RequestOutput:
    """Read a stream to its end and return the output."""
    try:
        async for _ in stream:
            pass
    except RunError:
        if stream.output is None:
            raise
    assert stream.output is not None, "the stream has ended without an output"
    return stream.output
