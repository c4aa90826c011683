"""Generate text with an early-exit model: the class that notebooks and programs use."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.data.tokenization.chat_template import Message
from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.errors import RequestError
from ee_llm.inference.choices import Bos
from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.exits.policy import Exits
from ee_llm.inference.loaded_model import LoadedModel
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from ee_llm.inference.stream import TokenStream
from ee_llm.inference.text.chat import check_messages
from ee_llm.inference.text.json_lines import short
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from ee_llm.inference.verification.verify import VerificationReport, Verifier

Prompt = str | Sequence[int]


class LLM(LoadedModel):
    """An early-exit model that generates text.

    It decodes requests in batches. Each token exits at its own depth, and no sequence waits for the
    deepest one. The weights, the prompt, the exit policy, the strategy and the sampling parameters
    determine each output; other requests in the batch do not affect it.

    Several threads may call `generate`, `chat` and `stream` at the same time; the engine batches
    their requests. A stream belongs to one thread.

    Under a launcher such as torchrun, every rank builds an LLM. The leader generates, and all other
    ranks call `worker_loop`.

        with ee_llm.LLM("runs/tuned", dtype="bfloat16") as llm:
            outputs = llm.generate(["Once", "def main("], exits={8: 0.9, 16: 0.8})
            print(outputs[0].text, outputs[0].mean_depth)

    Attributes:
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        dtype: Dtype of the computation.
        policy: Exit policy of requests without one.
        is_leader: Whether this process takes requests; all other ranks call `worker_loop`.
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        exits: Exits | None = None,
        strategy: Strategy | SelfSpeculation | Contrast = "exact",
        bos: Bos = "auto",
        parse_special: bool = False,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Return the continuations of prompts, in order.

        A request that fails, for example because logits are not finite, does not affect the others:
        its output has the finish reason "error" and a message in `error`.

        Args:
            prompts: A prompt or a list of prompts. A prompt is a text or a list of token ids.
            sampling_params: How tokens are drawn and when generations end, for all prompts or as a
                list with an entry for each. With n > 1, the n outputs of a prompt are adjacent.
            exits: Exit policy, as in the constructor, whose policy is the default.
            strategy: "exact", "full", "propagate", "self-speculative" or a `SelfSpeculation`,
                "sled" or an `SLED`, "dola" or a `DoLa`.
            bos: "on" and "off" add and omit the beginning-of-sequence token before a prompt; "auto"
                follows the tokenizer's settings for texts, and adds none to token ids.
            parse_special: Convert special tokens in a text, such as <|im_end|>, to their ids.
            progress: Show a progress bar in terminals.

        Raises:
            RequestError: A prompt or parameter is not valid. In this case, nothing is generated.
            RunError: Someone else aborted a request, for example by closing the model.
        """
        encoded = [
            self.encode_prompt(prompt, bos=bos, parse_special=parse_special)
            for prompt in _prompt_list(prompts)
        ]
        return self._generate(encoded, sampling_params, exits, strategy, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        exits: Exits | None = None,
        strategy: Strategy | SelfSpeculation | Contrast = "exact",
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Return the answers to conversations, in order.

        Args:
            messages: A conversation in OpenAI's format, [{"role": "user", "content": "Hello"}], or
                a list of conversations. The model's chat template formats them.
            sampling_params: See `generate`.
            exits: See `generate`.
            strategy: See `generate`.
            progress: See `generate`.

        Raises:
            RequestError: A conversation or parameter is not valid, or the model has no chat
                template.
        """
        is_single = not (_is_list(messages) and messages and _is_list(messages[0]))
        conversations: Any = [messages] if is_single else messages
        encoded = [
            self._encoder.encode_chat(check_messages(_as_list(one), f"conversation {number}"))
            for number, one in enumerate(conversations, start=1)
        ]
        return self._generate(encoded, sampling_params, exits, strategy, progress)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        exits: Exits | None = None,
        strategy: Strategy | SelfSpeculation | Contrast = "exact",
        bos: Bos = "auto",
        parse_special: bool = False,
    ) -> TokenStream:
        """Return an iterator over the tokens of a continuation as they are generated.

        The concatenated texts of the tokens are the text of the output. The request is aborted if
        the stream is closed, left as a context manager, or garbage-collected before its end.

        Args:
            prompt: A text, token ids, or a conversation.
            sampling_params: See `generate`; n must be 1.
            exits: See `generate`.
            strategy: See `generate`.
            bos: See `generate`.
            parse_special: See `generate`.

        Raises:
            RequestError: The prompt or a parameter is not valid.
            RunError: The request failed or was aborted by someone else. The iterator raises this,
                not `stream`.
        """
        encoded = self.encode_prompt(prompt, bos=bos, parse_special=parse_special)
        params = sampling_params or SamplingParams()
        request = self.make_request(encoded, params, exits=exits, strategy=strategy)
        return self.stream_request(request, encoded.text)

    def encode_prompt(
        self,
        prompt: Prompt | Sequence[Message],
        *,
        bos: Bos = "auto",
        parse_special: bool = False,
    ) -> EncodedPrompt:
        """Return the token ids of a prompt, and its text as the model sees it.

        Args:
            prompt: A text, token ids, or a conversation.
            bos: See `generate`.
            parse_special: See `generate`.

        Raises:
            RequestError: The prompt is not valid.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("A prompt is an empty text. Give at least one character.")
            if not is_encodable(prompt):
                raise RequestError(f"Prompt {short(prompt)} is not valid Unicode text.")
            return self._encoder.encode_text(prompt, bos=bos, parse_special=parse_special)
        if _is_list(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            return self._encoder.encode_chat(check_messages(list(prompt), "messages"))
        ids = list(prompt) if _is_list(prompt) else None
        if ids is None or not all(type(token) is int for token in ids):
            raise RequestError(f"Prompt {short(prompt)}: give a text or a list of token ids.")
        return self._encoder.encode_ids(ids, bos=bos)  # type: ignore[arg-type]

    def verify(self, outputs: RequestOutput | Iterable[RequestOutput]) -> VerificationReport:
        """Check outputs of this model against their definition, with one forward pass over each.

        The report passes if every token and exit is what the weights, the policy and the seed
        define, up to rounding in the model's dtype ("The certificate" in
        docs/reference/generation.md has the tolerances).

        Args:
            outputs: One output or several. Outputs without tokens are skipped.

        Raises:
            RequestError: The engine quantizes the weights, or an output does not fit the model.
        """
        if self.quantize != "none":
            raise RequestError(
                f"quantize = {self.quantize!r}: the checkpoint has other weights than the engine,"
                " so outputs cannot be verified. Use quantize='none'."
            )
        found = [outputs] if isinstance(outputs, RequestOutput) else list(outputs)
        for output in found:
            if not isinstance(output, RequestOutput):
                raise RequestError(f"{short(output)} is not a RequestOutput.")
        finished = [(output, self.dtype) for output in found if output.token_ids]
        return Verifier(self._reader).verify(finished)

    def _generate(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        exits: Exits | None,
        strategy: Strategy | SelfSpeculation | Contrast,
        progress: bool,
    ) -> list[RequestOutput]:
        params = _params_list(sampling_params, len(prompts))
        requests: list[Request] = []
        texts: dict[str, str] = {}
        indices: dict[str, int] = {}
        for prompt, of_prompt in zip(prompts, params, strict=True):
            for index, sample in enumerate(of_prompt.samples()):
                request = self.make_request(prompt, sample, exits=exits, strategy=strategy)
                requests.append(request)
                texts[request.id], indices[request.id] = prompt.text, index
        outputs: dict[str, RequestOutput] = {}
        count = TextColumn("{task.completed}/{task.total} outputs")
        with distributed.progress_bar(
            "generating", len(requests), count, is_quiet=not progress
        ) as bar:
            (task,) = bar.task_ids
            with closing(self.run(requests, texts)) as finished:
                for output in finished:
                    outputs[output.request_id] = replace(output, index=indices[output.request_id])
                    bar.update(task, advance=1)
        if len(outputs) < len(requests):
            raise RequestError(
                "The LLM was closed, or a request aborted, before the outputs were complete."
            )
        return [outputs[request.id] for request in requests]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_list(value: Any) -> Any:
    return list(value) if _is_list(value) else value


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(
            f"prompts = {short(prompts)}. Give a text, a list of token ids, or a list of them."
        )
    if prompts and all(isinstance(token, int) for token in prompts):
        return [prompts]  # type: ignore[list-item]
    found: list[Prompt] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, int) or not isinstance(prompt, str | Sequence):
            raise RequestError(
                f"prompts[{number}] is {short(prompt)}. Give a text or a list of token ids."
            )
        found.append(prompt)
    return found


def _params_list(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not _is_list(params) or not all(isinstance(one, SamplingParams) for one in params):
        raise RequestError(
            f"sampling_params = {short(params)}. Give SamplingParams, or a list of them."
        )
    if len(params) != count:
        raise RequestError(
            f"sampling_params has {len(params)} entries for {count} prompts. Give one for each"
            " prompt, or a single one."
        )
    return list(params)
