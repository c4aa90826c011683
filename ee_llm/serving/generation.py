"""Serve the requests of `/v1/completions` and `/v1/chat/completions`."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response

from ee_llm.errors import RequestError, RunError
from ee_llm.inference.outputs import RequestOutput, StepOutput, TokenOutput
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from ee_llm.serving.async_engine import AsyncTokenStream
from ee_llm.serving.events import EventStream, until_disconnect
from ee_llm.serving.formats import Format, to_json
from ee_llm.serving.limits import Place, Reservation
from ee_llm.serving.metrics.sequence_metrics import SequenceMetrics
from ee_llm.serving.operator.enforce import Effective
from ee_llm.serving.protocol.completions import Usage
from ee_llm.serving.protocol.ee import EEClamp
from ee_llm.serving.protocol.errors import ApiError, bad_request, engine_refusal
from ee_llm.serving.protocol.sampling import MAX_CHOICES, GenerationFields
from ee_llm.serving.service import ENGINE_FAILED, Service

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """What differs between completions and chats.

    Attributes:
        kind: Model of the request.
        param: Field that has the prompts.
        prompts: Returns the prompts of a request.
        make_format: Returns the format of the response to a request, with what the operator's
            limits have changed in it.
        max_tokens: Maximum number of tokens to generate by default, if as many fit; None for as
            many as fit.
    """

    kind: type[GenerationFields]
    param: str
    prompts: Callable[[Any], Sequence[Any]]
    make_format: Callable[[Any, Sequence[EEClamp]], Format]
    max_tokens: int | None


@dataclass(frozen=True)
class Choice:
    """A sequence of a request."""

    index: int
    prompt: EncodedPrompt
    stream: AsyncTokenStream
    metrics: SequenceMetrics


@dataclass(frozen=True)
class _Accounts:
    """Keeps the share and the metrics of a sequence up to date, also if nobody reads its stream.

    It is a `StreamObserver`.
    """

    place: Place
    metrics: SequenceMetrics

    def received(self, step: StepOutput) -> None:
        self.metrics.add(step)
        if step.tokens:
            self.place.started()

    def ended(self) -> None:
        self.place.ended()


async def respond(service: Service, endpoint: Endpoint, http: HttpRequest) -> Response:
    """Return the response to a request: one JSON object, or a stream of events.

    Raises:
        ApiError: The request is not valid, or cannot be served now.
        ClientDisconnectedError: The client has disconnected.
    """
    started = asyncio.get_running_loop().time()
    deadline = started + service.settings.request_timeout_s
    with ExitStack() as stack:
        body: GenerationFields
        body, reservation = await service.read_body(http, endpoint.kind, stack)
        body.check_supported()
        state = http.scope["state"]
        exits = service.gatekeeper.apply(body.ee, state["request_id"], state["key_id"])
        choices: list[Choice] = []
        stack.callback(_finish, service, http, choices, started)
        try:
            async with asyncio.timeout_at(deadline):
                starting = _start(service, endpoint, body, exits, reservation, choices, started)
                await until_disconnect(http, starting)
                if not body.stream:
                    outputs = await until_disconnect(http, _outputs(choices))
        except TimeoutError:
            raise _timeout(service) from None
        except RunError as error:
            raise service.engine_error(str(error)) from None
        format = endpoint.make_format(body, exits.clamps)
        if body.stream:
            events = _events(service, format, body, choices, deadline)
            return EventStream(events, deadline, stack.pop_all().close)
        prompts = [choice.prompt for choice in choices]
        usage = _usage(choices, outputs, body.num_samples)
        response = format.response(prompts, outputs, usage)
        return Response(to_json(response), media_type="application/json")


async def _start(
    service: Service,
    endpoint: Endpoint,
    body: GenerationFields,
    exits: Effective,
    reservation: Reservation,
    choices: list[Choice],
    arrived: float,
) -> None:
    """Submit the sequences of a request, and append each to `choices`."""
    llm = service.engine.llm
    prompts, count = endpoint.prompts(body), body.num_samples
    if len(prompts) * count > MAX_CHOICES:
        raise bad_request(
            f"{len(prompts)} prompts with n = {count} are more than {MAX_CHOICES} choices. Send"
            " several requests.",
            "n",
        )
    encoded = await service.encode(prompts, endpoint.param)
    num_tokens = sum(len(prompt.token_ids) for prompt in encoded)
    reservation.resize(len(prompts) * count, num_tokens * count)
    for prompt in encoded:
        fits = max(1, llm.engine.max_positions - len(prompt.token_ids) + 1)
        params = body.sampling_params(min(fits, endpoint.max_tokens or fits))
        for sample in params.samples():
            try:
                request = llm.make_request(
                    prompt, sample, exits=exits.policy, strategy=exits.strategy
                )
                metrics = SequenceMetrics(service.metrics, len(prompt.token_ids), arrived)
                accounts = _Accounts(Place(reservation, len(prompt.token_ids)), metrics)
                stream = await service.engine.submit(request, prompt.text, accounts)
            except RequestError as error:
                raise engine_refusal(error, endpoint.param) from None
            choices.append(Choice(len(choices), prompt, stream, metrics))


async def _events(
    service: Service,
    format: Format,
    body: GenerationFields,
    choices: Sequence[Choice],
    deadline: float,
) -> AsyncGenerator[str, None]:
    """Yield the events of a stream; an error ends it."""
    for choice in choices:
        if first := format.first(choice.index, choice.prompt):
            yield _event(first)
    outputs: list[RequestOutput] = []
    try:
        async with aclosing(_tokens(choices, deadline)) as tokens:
            async for choice, token, output in tokens:
                if output is not None:
                    outputs.append(output)
                yield _event(format.chunk(choice.index, choice.prompt, token, output))
    except TimeoutError:
        yield _timeout(service).event
        return
    except RunError as error:
        yield service.engine_error(str(error)).event
        return
    if body.include_usage:
        yield _event(format.last(_usage(choices, outputs, body.num_samples)))
    yield "data: [DONE]\n\n"


async def _outputs(choices: Sequence[Choice]) -> list[RequestOutput]:
    """Return the outputs of all choices, in order."""
    outputs: dict[int, RequestOutput] = {}
    async with aclosing(_tokens(choices, None)) as tokens:
        async for choice, _, output in tokens:
            if output is not None:
                outputs[choice.index] = output
    return [outputs[choice.index] for choice in choices]


_Item = tuple[Choice, TokenOutput, RequestOutput | None]


async def _tokens(choices: Sequence[Choice], deadline: float | None) -> AsyncGenerator[_Item, None]:
    """Yield the tokens of all choices as they come, the last of a choice with its output.

    Raises RunError if a choice fails, and TimeoutError after the deadline.
    """
    # A reader that is too slow fills the queue, then the streams, which abort their requests.
    queue: asyncio.Queue[_Item | RunError] = asyncio.Queue(len(choices))

    async def read(choice: Choice) -> None:
        count = 0
        try:
            async for token in choice.stream:
                count += 1
                output = choice.stream.output  # set before the tokens of the last step are read
                if output is not None and (output.error or count < len(output.token_ids)):
                    output = None
                await queue.put((choice, token, output))
        except RunError as error:
            await queue.put(error)
        except Exception:
            logger.exception("Choice %d of a request failed.", choice.index)
            await queue.put(RunError(ENGINE_FAILED))

    readers = [asyncio.create_task(read(choice)) for choice in choices]
    num_unfinished = len(choices)
    try:
        while num_unfinished:
            async with asyncio.timeout_at(deadline):
                item = await queue.get()
            if isinstance(item, RunError):
                raise item
            num_unfinished -= item[2] is not None
            yield item
    finally:
        for reader in readers:
            reader.cancel()


def _finish(service: Service, http: HttpRequest, choices: Sequence[Choice], started: float) -> None:
    """Abort the sequences that are not finished, and log what the request took."""
    for choice in choices:
        choice.stream.close()
        choice.metrics.close("error" if service.engine.error else "abort")
    if not choices or not service.settings.log_requests:
        return
    outputs = [choice.stream.output for choice in choices]
    finished = [output for output in outputs if output is not None]
    seconds = asyncio.get_running_loop().time() - started
    exits = [exit for output in finished for exit in output.exits]
    logger.info(
        "%s %s: %d of %d choices finished, %d prompt tokens, %d generated, mean depth %.2f of %d,"
        " policy %s, %.2f s",
        http.scope["state"]["request_id"],
        http.url.path,
        len(finished),
        len(choices),
        sum(len(choice.prompt.token_ids) for choice in choices),
        len(exits),
        sum(exits) / max(1, len(exits)),
        service.engine.llm.config.model.num_layers,
        choices[0].stream.request.policy.under(choices[0].stream.request.strategy).digest,
        seconds,
    )


def _usage(choices: Sequence[Choice], outputs: Sequence[RequestOutput], num_samples: int) -> Usage:
    """Return the number of tokens; a prompt with several samples counts once."""
    prompt = sum(len(choice.prompt.token_ids) for choice in choices[::num_samples])
    generated = sum(len(output.token_ids) for output in outputs)
    return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


def _event(response: Any) -> str:
    return f"data: {to_json(response)}\n\n"


def _timeout(service: Service) -> ApiError:
    return ApiError(
        504,
        f"The request was aborted after {service.settings.request_timeout_s:g} s, the limit of this"
        " server. Ask for fewer tokens.",
        code="request_timeout",
    )
