"""The common interface of engines: requests in, outputs out."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from typing import Self

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.errors import RequestError, RunError
from ee_llm.inference.decoding.settings import resolve_contrast
from ee_llm.inference.exits.policy import check_exits
from ee_llm.inference.outputs import RequestOutput, StepOutput, TokenOutput
from ee_llm.inference.request import Request
from ee_llm.inference.scheduling.base import Load, SchedulerBase
from ee_llm.inference.scheduling.engine_lock import EngineLock
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.text.detokenizer import Detokenize


class OutputStream(Iterator[StepOutput]):
    """An iterator over the step outputs of one request (see `EngineBase.stream`).

    The request is aborted if the stream is closed, left as a context manager, or garbage-collected
    before its end, whether or not an output was read from it. If someone else aborts the request,
    the iterator raises RunError.
    """

    def __init__(
        self, engine: "EngineBase", sequence: Sequence, outputs: deque[StepOutput]
    ) -> None:
        self._engine = engine
        self._sequence = sequence
        self._outputs = outputs
        self._is_over = False  # The final output was read, or the stream was closed.

    def __next__(self) -> StepOutput:
        try:
            self._engine.advance_while(self._is_waiting)
        except BaseException:
            self.close()
            raise
        if self._outputs:
            output = self._outputs.popleft()
            self._is_over = output.request_output is not None
            return output
        if self._is_over:
            raise StopIteration
        self._is_over = True
        raise RunError(f"Request {self._sequence.request.id!r} was aborted before its end.")

    def close(self) -> None:
        """Abort the request unless it is finished, and drop outputs that were not read."""
        self._outputs.clear()
        self._is_over = True
        self._engine.abort_sequence(self._sequence)

    def _is_waiting(self) -> bool:
        return not self._outputs and self._engine.is_running(self._sequence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._engine.abandon(self._sequence)


class EngineBase(ABC):
    """Takes requests and decodes them step by step, each as `generate_reference` defines it.

    Outputs go to the caller that submitted the request, no matter which call ran the pass: a stream
    yields its own, `generate` returns its own, and `step` returns those of requests submitted with
    `add`.

    Several threads may call all methods but `step` at the same time. A lock lets one of them run a
    step at a time, and each step serves the requests of all.

    Attributes:
        config: The model's configuration.
        boundaries: Boundaries of all exits, the final one last.
    """

    def __init__(
        self,
        config: Config,
        scheduler: SchedulerBase,
        detokenize: Detokenize | None,
        ranks: distributed.InferenceGrid | None,
        gated: Collection[int] = (),
    ) -> None:
        """Start without requests. gated: boundaries of the exits that have a gate."""
        self.config = config
        self._gated = frozenset(gated)
        self.boundaries = (*config.exits.boundaries, config.model.num_layers)
        self._scheduler = scheduler
        self._detokenize = detokenize
        self._ranks = ranks
        self._is_open = True
        self._sequences: dict[str, Sequence] = {}
        self._num_reported: dict[str, int] = {}
        self._inboxes: dict[str, deque[StepOutput]] = {}
        self._inbox: deque[StepOutput] = deque()  # of requests submitted with `add`
        self._lock = EngineLock(self._abort_abandoned)
        self._abandoned: deque[Sequence] = deque()

    @abstractmethod
    def _advance(self) -> list[Sequence]:
        """Run one unit of work, if there is any, and return the sequences that it changed."""

    @abstractmethod
    def worker_loop(self) -> None:
        """Run passes for the leading rank until it shuts down; for all other ranks of an engine.

        Raises:
            RankLostError: Another rank has ended or does not respond.
        """

    @abstractmethod
    def _shutdown(self) -> None:
        """Complete the passes in flight and shut down the other ranks."""

    def close(self) -> None:
        """Shut down the other ranks once the passes in flight are complete.

        Do nothing if the engine is closed already or was ended by an exception. A rank that is lost
        meanwhile is not an error.
        """
        with self._lock.held():
            if not self._is_open:
                return
            self._is_open = False
            try:
                self._shutdown()
            except distributed.RankLostError:
                self._end()

    def _end(self) -> None:
        """End the engine on all ranks after an exception that leaves them out of step."""
        self._is_open = False
        if self._ranks is not None:
            self._ranks.shutdown()

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of sequences that run at once."""
        return self._scheduler.config.max_num_seqs

    @property
    def max_positions(self) -> int:
        """Maximum number of positions of a sequence: the model's, or those that the cache has."""
        blocks = self._scheduler.blocks
        return min(self.config.model.max_seq_length, (blocks.num_blocks - 1) * blocks.block_size)

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        return self._scheduler.load

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, or `step` has outputs to return."""
        return self._scheduler.has_work or bool(self._inbox)

    def step(self) -> list[StepOutput]:
        """Run one engine step and return the new outputs of requests submitted with `add`.

        A request whose logits are not finite ends with the finish reason `error`; others continue.
        """
        with self._lock.held():
            self.advance()
            outputs = list(self._inbox)
            self._inbox.clear()
        return outputs

    def advance(self) -> None:
        """Run one engine step and keep the outputs for the callers that submitted the requests.

        Raises:
            RunError: The engine was closed or ended by an exception.
        """
        with self._lock.held():
            if not self._is_open:
                raise RunError("The engine was closed or ended by an exception. Build a new one.")
            changed = {sequence.request.id: sequence for sequence in self._advance()}
            for id, sequence in changed.items():
                if self.is_running(sequence):
                    inbox = self._inboxes[id]  # A finished request is forgotten.
                    if output := self._step_output(sequence):
                        inbox.append(output)

    def advance_while(self, is_needed: Callable[[], bool]) -> None:
        """Run engine steps while `is_needed` returns true; other threads may do so in between."""
        while is_needed():
            with self._lock.held():
                if is_needed():  # Another thread may have run the step meanwhile.
                    self.advance()
            self._lock.let_others_run()

    def abandon(self, sequence: Sequence) -> None:
        """Abort a sequence, unless it is finished, without waiting for the lock.

        Garbage collection calls this, in any thread and at any moment. If the engine is busy, the
        sequence is aborted at the end of the current call.
        """
        self._abandoned.append(sequence)
        self._lock.run_if_free()

    def is_running(self, sequence: Sequence) -> bool:
        """Return whether a sequence is unfinished; another one may have taken its id."""
        return self._sequences.get(sequence.request.id) is sequence

    def check(self, request: Request) -> None:
        """Raise RequestError if the model cannot serve a request."""
        model = self.config.model
        if len(request.prompt_token_ids) > model.max_seq_length:
            raise RequestError(
                f"The prompt has {len(request.prompt_token_ids)} tokens, more than"
                f" model.max_seq_length = {model.max_seq_length}. Shorten it."
            )
        params = request.sampling_params
        for token in request.prompt_token_ids:
            if not 0 <= token < model.vocab_size:
                raise RequestError(
                    f"Token id {token} in the prompt is outside model.vocab_size ="
                    f" {model.vocab_size}. Use the tokenizer that the model was trained with."
                )
        for token in params.stop_token_ids:
            if not 0 <= token < model.vocab_size:
                raise RequestError(
                    f"Token id {token} in stop_token_ids is outside model.vocab_size ="
                    f" {model.vocab_size}. Remove it, since the model cannot generate it."
                )
        exits = self.boundaries[:-1]
        check_exits(request.policy, request.strategy, request.speculation, exits, self._gated)
        contrast = request.contrast
        if contrast is not None and resolve_contrast(contrast, self.config) != contrast:
            raise RequestError(
                f"{contrast} does not name its boundaries and head. Use resolve_contrast first."
            )
        if params.stop and self._detokenize is None:
            raise RequestError(
                f"stop = {list(params.stop)} needs an engine with a tokenizer. Give it detokenize=."
            )
        banned = params.banned_token_ids(0, request.eos_token_ids, model.vocab_size)
        if len(banned) >= model.vocab_size:
            raise RequestError(
                f"min_tokens = {params.min_tokens} bans all {model.vocab_size} token ids, since all"
                " are end or stop tokens. Remove some of stop_token_ids."
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestError if it cannot be served."""
        self._add(request, self._inbox)

    def _add(self, request: Request, inbox: deque[StepOutput]) -> Sequence:
        with self._lock.held():
            if request.id in self._sequences:
                raise RequestError(
                    f"Request id {request.id!r} is in use. Unfinished requests need unique ids."
                )
            self.check(request)
            model = self.config.model
            sequence = Sequence(
                request, self.boundaries, model.max_seq_length, model.vocab_size, self._detokenize
            )
            self._scheduler.add(sequence)
            self._sequences[request.id] = sequence
            self._num_reported[request.id] = 0
            self._inboxes[request.id] = inbox
        return sequence

    def abort(self, id: str) -> RequestOutput | None:
        """Abort a request and return its output so far; None if it has no token yet.

        Outputs of the request that were not read yet are dropped. Raises RequestError if no
        unfinished request has this id.
        """
        with self._lock.held():
            if id not in self._sequences:
                raise RequestError(f"Request id {id!r} is finished, aborted or unknown.")
            sequence = self._sequences[id]
            sequence.finish_reason = "abort"
            self._scheduler.remove(sequence)
            inbox = self._inboxes[id]
            for output in list(inbox):
                if output.request_id == id:
                    inbox.remove(output)
            self._forget(id)
            return sequence.output() if sequence.exits else None

    def abort_sequence(self, sequence: Sequence) -> None:
        """Abort a sequence unless it is finished."""
        with self._lock.held():
            if self.is_running(sequence):
                self.abort(sequence.request.id)

    def abort_all(self) -> None:
        """Abort all unfinished requests; their streams raise RunError."""
        with self._lock.held():
            for id in list(self._sequences):
                self.abort(id)

    def stream(self, request: Request) -> OutputStream:
        """Return an iterator over the outputs of one request; other requests continue meanwhile.

        Several streams may be open, and `step` may be called beside them. Raises RequestError at
        once, as `add` does.
        """
        outputs: deque[StepOutput] = deque()
        return OutputStream(self, self._add(request, outputs), outputs)

    def generate(
        self, requests: Iterable[Request], on_output: Callable[[StepOutput], None] | None = None
    ) -> list[RequestOutput]:
        """Return the output of each request, in order.

        If one of them cannot be added, none is. After an exception none continues.

        Args:
            requests: The requests.
            on_output: Called with each step's output of any of them.

        Raises:
            RequestError: A request cannot be served, or was aborted while others ran.
        """
        requests = list(requests)
        finished: dict[str, RequestOutput] = {}
        for output in self.run(requests):
            if on_output:
                on_output(output)
            if output.request_output:
                finished[output.request_id] = output.request_output
        aborted = [request.id for request in requests if request.id not in finished]
        if aborted:
            raise RequestError(f"Request {aborted[0]!r} was aborted while it was generated.")
        return [finished[request.id] for request in requests]

    def run(self, requests: Iterable[Request]) -> Generator[StepOutput, None, None]:
        """Yield the outputs of requests as they come, in any order.

        If one of the requests cannot be added, none is. Requests that are unfinished when the
        iterator is closed are aborted. Raises RequestError as `add` does.
        """
        added: list[Sequence] = []
        inbox: deque[StepOutput] = deque()
        try:
            for request in requests:
                added.append(self._add(request, inbox))
            while True:
                self.advance_while(lambda: not inbox and any(map(self.is_running, added)))
                if not inbox:
                    return
                yield inbox.popleft()
        finally:
            for sequence in added:
                self.abort_sequence(sequence)

    def _abort_abandoned(self) -> None:
        while self._abandoned:
            self.abort_sequence(self._abandoned.popleft())

    def _step_output(self, sequence: Sequence) -> StepOutput | None:
        id = sequence.request.id
        start, stop = self._num_reported[id], len(sequence.exits)
        if start == stop and sequence.finish_reason is None:
            return None
        self._num_reported[id] = stop
        columns = zip(
            sequence.tokens[sequence.num_prompt + start : sequence.num_confirmed],
            sequence.exits[start:],
            sequence.confidences[start:],
            sequence.logprobs[start:],
            sequence.top_logprobs[start:],
            strict=True,
        )
        tokens = tuple(
            TokenOutput(token, exit, confidence, logprob, "", top)
            for token, exit, confidence, logprob, top in columns
        )
        if sequence.finish_reason is None:
            return StepOutput(id, tokens)
        self._forget(id)
        return StepOutput(id, tokens, sequence.output())

    def _forget(self, id: str) -> None:
        del self._sequences[id], self._num_reported[id], self._inboxes[id]
