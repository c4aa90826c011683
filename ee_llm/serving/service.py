"""The state of a server, and what its endpoints share."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from ee_llm.errors import UserError
from ee_llm.inference.choices import Bos
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from ee_llm.serving.async_engine import CLOSED
from ee_llm.serving.async_llm import AsyncLLM
from ee_llm.serving.body import check_headers, read_body
from ee_llm.serving.limits import BODIES_AT_A_TIME, RETRY_AFTER_S, Admission, Reservation
from ee_llm.serving.metrics.server_metrics import ServerMetrics
from ee_llm.serving.operator.gatekeeper import Gatekeeper
from ee_llm.serving.protocol.errors import ApiError, bad_request
from ee_llm.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

ENGINE_FAILED = "The engine has failed; the server's log has the reason."
"""What clients get to know: paths, ranks and exceptions are none of their business."""

_Result = TypeVar("_Result")

_ENCODING_THREADS = 2  # Long prompts must not take all cores from the engine.


class Service:
    """A model that is served, its limits, and whether it takes requests.

    Attributes:
        engine: The model.
        settings: The settings.
        admission: What is in progress.
        gatekeeper: The operator's limits of exits and strategies.
        metrics: What `/metrics` reports.
        created: Time at which the server started, in seconds since 1970.
        system_fingerprint: Identity of the weights and their dtype, in every response.
        is_draining: Whether the server refuses new requests because it stops.
    """

    def __init__(self, engine: AsyncLLM, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        max_num_seqs = engine.llm.engine.max_num_seqs
        self.admission = Admission(
            max_num_seqs + settings.max_queued_requests,
            settings.max_queued_tokens,
            BODIES_AT_A_TIME * settings.max_body_bytes,
        )
        self.gatekeeper = Gatekeeper(
            engine.llm.policy, settings.limits, settings.limits_key_file, settings.audit_log
        )
        self.metrics = ServerMetrics(settings.model_name, engine.llm.engine, self.gatekeeper)
        self.created = int(time.time())
        weights = f"{engine.llm.fingerprint} {engine.llm.dtype} {engine.llm.quantize}"
        digest = hashlib.sha256(weights.encode()).hexdigest()
        self.system_fingerprint = f"fp_{digest[:12]}"
        self.is_draining = False
        self._is_stalled = False
        self._threads = ThreadPoolExecutor(_ENCODING_THREADS, "ee_llm encode")
        llm = engine.llm
        special = {id: text for text, id in llm.tokenizer.special_tokens.items()}
        self.token_text = lru_cache(2**16)(
            lambda token: special[token] if token in special else llm.decode([token])
        )

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens that the model reads of a prompt and its continuation.

        The last token of a continuation is not read, so there may be one more.
        """
        return self.engine.llm.config.model.max_seq_length

    @property
    def has_failed(self) -> bool:
        """Whether the engine has ended by a failure, which it has logged."""
        return self.engine.error not in (None, CLOSED)

    @property
    def trouble(self) -> str | None:
        """Why the engine does not work, "failed" or "stalled"; None if it does."""
        if self.engine.error is not None:
            return "failed"
        seconds = self.engine.seconds_in_step
        was_stalled, self._is_stalled = self._is_stalled, seconds > self.settings.stall_timeout_s
        if self._is_stalled and not was_stalled:
            logger.error("The engine's step has been running for %.0f s.", seconds)
        return "stalled" if self._is_stalled else None

    async def read_body(
        self, http: HttpRequest, kind: type[Any], stack: ExitStack
    ) -> tuple[Any, Reservation]:
        """Return the body of a request, of this kind, and its reservation, which `stack` closes.

        Raises ApiError if the server takes no requests, or the request cannot be served.
        """
        settings = self.settings
        self.check_open()
        check_headers(http, settings.max_body_bytes)
        reservation = stack.enter_context(self.admission.reserve())
        body = await read_body(
            http, kind, settings.max_body_bytes, settings.body_timeout_s, reservation
        )
        self.check_model(body.model)
        return body, reservation

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) unless a request names the model of this server, or none."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist. This server has"
                f" {self.settings.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_open(self) -> None:
        """Raise ApiError (503) if the server takes no requests."""
        if self.is_draining:
            raise ApiError(
                503,
                "The server is shutting down. Send the request to another one, or later.",
                code="shutting_down",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        if self.engine.error is not None:
            raise self.engine_error(self.engine.error)

    def engine_error(self, message: str) -> ApiError:
        """Return the error of a request that ended because of the engine."""
        if self.has_failed:
            return ApiError(500, ENGINE_FAILED, code="engine_error")
        if self.is_draining:
            return ApiError(503, message, code="shutting_down")
        return ApiError(500, message, code="engine_error")

    async def encode(
        self, prompts: Sequence[Any], param: str, bos: Bos = "auto"
    ) -> list[EncodedPrompt]:
        """Return encoded prompts: texts, token ids or conversations.

        Raises ApiError (400) for a prompt that is not valid; param: the field that has it.
        """
        encode = self.engine.llm.encode_prompt
        try:
            return await self.run(lambda: [encode(prompt, bos=bos) for prompt in prompts])
        except UserError as error:
            raise bad_request(str(error), param) from None

    async def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Return the result of a function that takes long, run in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    def close(self) -> None:
        """End the threads that encode prompts, and close the audit log."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.gatekeeper.close()
