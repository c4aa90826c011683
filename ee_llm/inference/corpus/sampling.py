"""Sample documents from a model: the same ones for any batch size."""

import math
from collections.abc import Callable, Generator, Sequence
from itertools import cycle

from ee_llm.errors import RunError
from ee_llm.inference.loaded_model import LoadedModel
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.prompt_encoder import EncodedPrompt


def sample_documents(
    model: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling_params: SamplingParams,
    *,
    num_tokens: int | None,
    max_num_seqs: int,
    on_step: Callable[[int, int], object] = lambda *_: None,
) -> Generator[RequestOutput, None, None]:
    """Yield continuations of prompts in order, sampled from the full model.

    Document i continues prompt i and uses the seed of sample i (`SamplingParams.sample`). After the
    last prompt, the first one follows again. The documents are the shortest sequence of this kind
    that has at least `num_tokens` generated tokens. They do not depend on the order in which they
    finish, so short documents are not preferred.

    Args:
        model: The model. Nothing else uses its engine meanwhile.
        prompts: The prompts.
        sampling_params: How tokens are drawn and when a document ends.
        num_tokens: Least number of generated tokens; None continues each prompt once.
        max_num_seqs: Maximum number of documents that are sampled at once.
        on_step: Called after each engine step with the number of tokens generated so far, and of
            documents that have ended.

    Raises:
        RequestError: A prompt does not fit the model.
        RunError: A document failed, for example because logits are not finite.
    """
    return _Sampler(model, prompts, sampling_params, num_tokens, max_num_seqs).run(on_step)


class _Sampler:
    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[EncodedPrompt],
        sampling_params: SamplingParams,
        num_tokens: int | None,
        max_num_seqs: int,
    ) -> None:
        self._model = model
        self._engine = model.engine
        self._prompts = iter(prompts) if num_tokens is None else cycle(prompts)
        self._sampling_params = sampling_params
        self._num_tokens = math.inf if num_tokens is None else num_tokens
        self._max_num_seqs = max_num_seqs
        self._num_started = 0
        self._running: dict[str, int] = {}  # tokens generated so far, by request id
        self._max_tokens: dict[str, int] = {}  # tokens a document may have, by request id
        self._num_ended = 0
        self._num_ended_tokens = 0
        self._waiting: dict[str, RequestOutput] = {}  # ended, but an earlier one has not

    def run(self, on_step: Callable[[int, int], object]) -> Generator[RequestOutput, None, None]:
        num_yielded = num_tokens = 0
        try:
            while num_tokens < self._num_tokens:
                self._start()
                if not self._running:
                    return
                self._step()
                on_step(self._num_ended_tokens + sum(self._running.values()), self._num_ended)
                while num_tokens < self._num_tokens and str(num_yielded) in self._waiting:
                    document = self._waiting.pop(str(num_yielded))
                    num_yielded += 1
                    num_tokens += len(document.token_ids)
                    yield document
        finally:
            for id in self._running:
                self._engine.abort(id)

    def _start(self) -> None:
        """Start documents as long as they will probably be needed."""
        while len(self._running) < self._max_num_seqs and self._expected() < self._num_tokens:
            prompt = next(self._prompts, None)
            if prompt is None:
                return
            request = self._model.make_request(
                prompt,
                self._sampling_params.sample(self._num_started),
                exits="off",
                strategy="full",
                id=str(self._num_started),
            )
            self._engine.add(request)
            self._running[request.id] = 0
            # The last token needs no position, since the model does not read it.
            max_length = self._model.config.model.max_seq_length + 1
            num_left = max_length - len(request.prompt_token_ids)
            self._max_tokens[request.id] = min(self._sampling_params.max_tokens, num_left)
            self._num_started += 1

    def _expected(self) -> float:
        """Return the number of tokens that the documents so far will probably have.

        A running document is expected to become as long as the mean of those that have ended, or
        before any has ended, as long as it may become.
        """
        if not self._num_ended:
            return sum(self._max_tokens.values())
        mean = self._num_ended_tokens / self._num_ended
        return self._num_ended_tokens + sum(max(n, mean) for n in self._running.values())

    def _step(self) -> None:
        failed = None
        for step in self._engine.step():
            id, output = step.request_id, step.request_output
            self._running[id] += len(step.tokens)
            if output is None:
                continue
            self._num_ended_tokens += self._running.pop(id)
            self._num_ended += 1
            self._waiting[id] = output
            failed = failed or (output if output.error is not None else None)
        if failed is not None:  # Several may have ended in this step, so fail after it.
            raise RunError(f"document {int(failed.request_id) + 1} failed: {failed.error}")
