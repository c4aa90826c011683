"""What every engine offers: requests in, updates out, whatever ranks the model runs on."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

from ee_llm.config import Config
from ee_llm.errors import RequestError
from ee_llm.inference.request import Request, Sequence
from ee_llm.inference.verification.reference_decoding import RequestOutput, TokenOutput

Detokenize = Callable[[list[int]], str]


@dataclass(frozen=True)
class StepOutput:
    """What a step brought to one request: new tokens and, when it is finished, all of it."""

    id: str
    token_outputs: tuple[TokenOutput, ...]
    generation: RequestOutput | None = None


class RequestQueue(Protocol):
    """Where requests wait and run."""

    @property
    def has_work(self) -> bool:
        """Return whether any sequence is unfinished."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError if there could never be room for it."""

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it stands."""


class OutputStream(Iterator[StepOutput]):
    """The updates of one request as they come, see `EngineBase.stream`.

    The request is aborted if the stream is closed, left as a context manager, or garbage-collected
    before its end, whether or not an update was taken from it.
    """

    def __init__(
        self, decoder: "EngineBase", sequence: Sequence, outputs: deque[StepOutput]
    ) -> None:
        self._decoder = decoder
        self._sequence = sequence
        self._updates = outputs

    def __next__(self) -> StepOutput:
        try:
            while not self._updates and self._decoder.is_running(self._sequence):
                self._decoder.advance()
        except BaseException:
            self.close()
            raise
        if not self._updates:
            raise StopIteration
        return self._updates.popleft()

    def close(self) -> None:
        """Abort the request unless it is finished, and drop what has not been taken yet."""
        self._updates.clear()
        if self._decoder.is_running(self._sequence):
            self._decoder.abort(self._sequence.request.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._decoder.abandon(self._sequence)


class EngineBase(ABC):
    """Takes requests and decodes them step by step, each as `generate_reference` defines it.

    Updates belong to whoever brought the request: a stream yields its own, `generate` returns its
    own, and `step` returns those of requests that came by `add`, whoever's call ran the pass.
    """

    def __init__(self, config: Config, queue: RequestQueue, decode: Detokenize | None) -> None:
        self.config = config
        self.boundaries = (*config.exits.boundaries, config.model.num_layers)
        self._queue = queue
        self._decode = decode
        self._sequences: dict[str, Sequence] = {}
        self._num_told: dict[str, int] = {}
        self._inboxes: dict[str, deque[StepOutput]] = {}
        self._inbox: deque[StepOutput] = deque()  # of the requests that came by `add`
        self._is_advancing = False
        self._abandoned: list[Sequence] = []

    @abstractmethod
    def _advance(self) -> list[Sequence]:
        """Do the next piece of work, maybe none, and return the sequences that it changed."""

    @abstractmethod
    def follow(self) -> None:
        """Run what the leading rank runs until it closes; for the other ranks of an engine.

        Raises RankLostError if a rank is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Let the ranks that follow this one go."""

    @property
    def has_work(self) -> bool:
        """Return whether a request is unfinished, or `step` has updates to return."""
        return self._queue.has_work or bool(self._inbox)

    def step(self) -> list[StepOutput]:
        """Do the next piece of work; return the new updates of requests that came by `add`.

        If there are other ranks, call this periodically when idle: it sends heartbeats to them. A
        request whose logits are not finite ends with the finish reason "error"; others go on.
        """
        self.advance()
        outputs = list(self._inbox)
        self._inbox.clear()
        return outputs

    def advance(self) -> None:
        """Do the next piece of work and keep the updates for whoever brought the requests."""
        self._is_advancing = True
        try:
            changed = {sequence.request.id: sequence for sequence in self._advance()}
            for id, sequence in changed.items():
                if not self.is_running(sequence):
                    continue
                inbox = self._inboxes.get(id, self._inbox)
                if output := self._update(sequence):
                    inbox.append(output)
        finally:
            self._is_advancing = False
            while self._abandoned:
                self.abandon(self._abandoned.pop())

    def abandon(self, sequence: Sequence) -> None:
        """Abort a sequence unless it is finished, once the step under way has ended.

        Garbage collection calls this, which may happen at any moment of a step.
        """
        if self._is_advancing:
            self._abandoned.append(sequence)
        elif self.is_running(sequence):
            self.abort(sequence.request.id)

    def is_running(self, sequence: Sequence) -> bool:
        """Return whether a sequence is unfinished; another one may have taken its id."""
        return self._sequences.get(sequence.request.id) is sequence

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestError, naming what is wrong, if it cannot be served."""
        if request.id in self._sequences:
            raise RequestError(
                f"request id {request.id!r} is in use; ids must differ while they run"
            )
        self._check(request)
        max_length = self.config.model.max_seq_length
        sequence = Sequence(request, self.boundaries, max_length, self._decode)
        self._queue.add(sequence)
        self._sequences[request.id] = sequence
        self._num_told[request.id] = 0

    def abort(self, id: str) -> RequestOutput | None:
        """Give a request up; return what it has so far, None if it has no token yet.

        Updates of it that nobody has taken yet are dropped. Raises RequestError for an id that is
        not under way.
        """
        if id not in self._sequences:
            raise RequestError(f"request id {id!r} is not under way: finished, aborted or unknown")
        sequence = self._sequences[id]
        sequence.finish_reason = "abort"
        self._queue.remove(sequence)
        inbox = self._inboxes.get(id, self._inbox)
        kept = [output for output in inbox if output.id != id]
        inbox.clear()
        inbox.extend(kept)
        self._forget(id)
        return _generation(sequence) if sequence.exits else None

    def stream(self, request: Request) -> OutputStream:
        """Return an iterator over the updates of one request as they come; others go on meanwhile.

        Several streams may be open, and others may call `step` beside them. Raises RequestError as
        `add` does, at once.
        """
        self.add(request)
        outputs = self._inboxes[request.id] = deque()
        return OutputStream(self, self._sequences[request.id], outputs)

    def generate(
        self, requests: Iterable[Request], on_output: Callable[[StepOutput], None] | None = None
    ) -> list[RequestOutput]:
        """Return the generation of each request, in their order; raises RequestError as `add` does.

        If one of them cannot be added, none is, and none goes on after an exception. Raises
        ValueError, too, if one was aborted meanwhile, once all others have ended.
        """
        requests = list(requests)
        added: list[Sequence] = []
        inbox: deque[StepOutput] = deque()
        finished: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                self.add(request)
                added.append(self._sequences[request.id])
                self._inboxes[request.id] = inbox
            while inbox or any(map(self.is_running, added)):
                if not inbox:
                    self.advance()
                    continue
                output = inbox.popleft()
                if on_output:
                    on_output(output)
                if output.generation:
                    finished[output.id] = output.generation
        finally:
            for sequence in filter(self.is_running, added):
                self.abort(sequence.request.id)
        aborted = [request.id for request in requests if request.id not in finished]
        if aborted:
            raise RequestError(f"request {aborted[0]!r} was aborted while it was being generated")
        return [finished[request.id] for request in requests]

    def _check(self, request: Request) -> None:
        model = self.config.model
        if len(request.prompt) > model.max_seq_length:
            raise RequestError(
                f"{len(request.prompt)} tokens are more than model.max_seq_length ="
                f" {model.max_seq_length}; shorten the prompt"
            )
        wrong = next((t for t in request.prompt if not 0 <= t < model.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} does not fit model.vocab_size = {model.vocab_size}; is this the"
                " tokenizer the model was trained with?"
            )
        exits = list(self.boundaries[:-1])
        request.policy.check_fits(exits)
        if request.draft is not None and request.draft.boundary not in exits:
            raise RequestError(
                f"draft boundary {request.draft.boundary} is no exit; the model has them at {exits}"
            )
        if request.stop_strings and self._decode is None:
            raise RequestError("stop_strings need an engine with a tokenizer; give it decode=")

    def _update(self, sequence: Sequence) -> StepOutput | None:
        id = sequence.request.id
        told, now = self._num_told[id], len(sequence.exits)
        if told == now and sequence.finish_reason is None:
            return None
        self._num_told[id] = now
        token_outputs = tuple(
            TokenOutput(token, exit, confidence, logprob)
            for token, exit, confidence, logprob in zip(
                sequence.new_tokens[told:],
                sequence.exits[told:],
                sequence.confidences[told:],
                sequence.logprobs[told:],
                strict=True,
            )
        )
        generation = None if sequence.finish_reason is None else _generation(sequence)
        if generation is not None:
            self._forget(id)
        return StepOutput(id, token_outputs, generation)

    def _forget(self, id: str) -> None:
        del self._sequences[id], self._num_told[id]
        self._inboxes.pop(id, None)


def _generation(sequence: Sequence) -> RequestOutput:
    request = sequence.request
    finish_reason = sequence.finish_reason
    assert finish_reason is not None, "the sequence is not finished"
    return RequestOutput(
        prompt=request.prompt,
        tokens=tuple(sequence.new_tokens),
        exits=tuple(sequence.exits),
        confidences=tuple(sequence.confidences),
        logprobs=tuple(sequence.logprobs),
        finish_reason=finish_reason,
        policy=request.policy.under(request.strategy),
        sampling=request.sampling,
        strategy=request.strategy,
        num_drafted=sequence.num_drafted,
        num_accepted=sequence.num_accepted,
        error=sequence.error,
    )
