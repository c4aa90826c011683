"""A model that is loaded for inference: its engine, tokenizer and ranks, and its requests."""

import itertools
import os
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, get_args

import torch

from ee_llm import distributed
from ee_llm.architecture.gates import gated_boundaries
from ee_llm.checkpoint.gates import read_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.errors import RequestError, RunError
from ee_llm.inference.choices import (
    Attention,
    DeferralMode,
    DtypeName,
    Quantize,
    check_bool,
    check_choice,
)
from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.quantization import check_quantize
from ee_llm.inference.execution.stage import check_layout
from ee_llm.inference.exits.policy import Exits, check_gates, resolve_policy
from ee_llm.inference.load import (
    load_engine,
    make_scheduler_config,
    policy_fingerprint,
    warn_of_large_tokenizer,
)
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.ranks.workers import Workers, announce_ready
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.plain_numbers import plain_float
from ee_llm.inference.strategies import SelfSpeculation, Strategy, resolve_strategy
from ee_llm.inference.stream import TokenStream
from ee_llm.inference.text.detokenizer import GeneratedText
from ee_llm.inference.text.prompt_encoder import EncodedPrompt, PromptEncoder

DEFAULT_THRESHOLD = 0.8


class LoadedModel:
    """A model with its engine; `LLM` adds the methods that take prompts as users write them.

    Attributes:
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        dtype, quantize: Dtype of the computation, and how the weights are stored.
        policy: Exit policy of requests without one.
        engine: The engine.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: DtypeName | torch.dtype = "auto",
        tensor: int = 1,
        pipeline: int = 1,
        max_num_seqs: int = 16,
        cache_tokens: int = 65536,
        exits: Exits | None = None,
        attention: Attention = "auto",
        cuda_graphs: bool = False,
        compile: bool = False,
        quantize: Quantize = "none",
        deferral: DeferralMode = "auto",
        chat_template: str | Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Load a model.

        With tensor x pipeline > 1, this starts the other ranks as processes on this machine, unless
        a launcher such as torchrun has already started that many ranks.

        Args:
            model: Checkpoint directory, or run directory, whose newest checkpoint is used.
            dtype: Dtype of the computation; "auto" is bfloat16 where the device supports it in
                hardware, else float32.
            tensor: Number of tensor-parallel ranks of each pipeline stage.
            pipeline: Number of pipeline stages.
            max_num_seqs: Maximum number of sequences that run at once.
            cache_tokens: Size of the K/V cache: total number of positions of all sequences. Memory
                beyond max_num_seqs sequences of full length is not allocated.
            exits: Default exit policy of the requests: a confidence threshold in (0, 1] for all
                exits, "off", thresholds by exit ({8: 0.9}; other exits are off), an `ExitPolicy`,
                or the path of a policy file. The default is 0.8 for all exits.
            attention: Attention kernel; "auto" selects the best one for the device.
            cuda_graphs: Replay passes with few rows as CUDA graphs.
            compile: Run the layers through torch.compile.
            quantize: "int8" keeps the weights of linear layers in 8 bits (needs torchao).
            deferral: "auto" defers rows that did not exit until others can share their pass, where
                that pays; "off" never does.
            chat_template: File with a chat template (Jinja) to use instead of the model's own.
            timeout_s: Maximum number of seconds to wait for another rank within a pass.

        Raises:
            UserError: The checkpoint cannot be read, or an argument does not fit it or the device.
        """
        self._reader = TensorReader(model)
        self.config = self._reader.config()
        self.dtype = _dtype(dtype)
        check_choice("quantize", quantize, get_args(Quantize))
        check_choice("deferral", deferral, get_args(DeferralMode))
        check_choice("attention", attention, get_args(Attention))
        check_bool("cuda_graphs", cuda_graphs)
        check_bool("compile", compile)
        if chat_template is not None and not isinstance(chat_template, str | Path):
            raise RequestError(f"chat_template = {chat_template!r} must be the path of a file")
        self._check(tensor, pipeline, max_num_seqs, cache_tokens, timeout_s, quantize)
        self.quantize = quantize
        self.tokenizer: Tokenizer = load_tokenizer(
            self._reader.tokenizer(), self.config.data.eos_token
        )
        template = None if chat_template is None else Path(chat_template)
        self._encoder = PromptEncoder(self.tokenizer, stated_bos(self._reader.path), template)
        gates = read_gates(self._reader)
        self._fingerprint_for = partial(policy_fingerprint, self._reader, gates=gates)
        given = DEFAULT_THRESHOLD if exits is None else exits
        self.policy = resolve_policy(given, self.config.exits.boundaries, self._fingerprint_for)
        check_gates(self.policy, gated_boundaries(gates))
        self._request_numbers = itertools.count(1)  # safe to use from several threads
        self._closing = ExitStack()
        self._ranks: distributed.InferenceGrid | None = None
        self._has_workers = False
        self._finalize: weakref.finalize[..., LoadedModel] | None = None
        self._is_open = False
        if tensor * pipeline > 1:
            self._connect(
                tensor,
                pipeline,
                float(timeout_s),
                {
                    "model": str(model),
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "max_num_seqs": max_num_seqs,
                    "cache_tokens": cache_tokens,
                    "attention": attention,
                    "cuda_graphs": bool(cuda_graphs),
                    "compile": bool(compile),
                    "quantize": quantize,
                    "deferral": deferral,
                    "timeout_s": float(timeout_s),
                },
            )
        with self._closing.pop_all() as stack:  # closes what was started if the engine fails
            self.engine = load_engine(
                self._reader,
                self.dtype,
                make_scheduler_config(
                    max_num_seqs, cache_tokens, self.config.model.max_seq_length, attention
                ),
                self.decode,
                deferral,
                self._ranks,
                ExecutionConfig(attention, cuda_graphs, compile, quantize),
            )
            self._closing = stack.pop_all()
        if self._ranks is not None and self._has_workers:
            # Also when this object is garbage-collected, and when Python shuts down.
            self._finalize = weakref.finalize(self, _abandon_ranks, self._closing, self._ranks)
        self._is_open = True
        if self.is_leader:
            warn_of_large_tokenizer(self.tokenizer, self.config.model.vocab_size)

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint."""
        return self._reader.path

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint's weights and configuration."""
        return self._reader.fingerprint()

    @property
    def encoder(self) -> PromptEncoder:
        """Encoder of prompts for this model."""
        return self._encoder

    @property
    def is_leader(self) -> bool:
        """Whether this process leads the engine; other ranks call `worker_loop`."""
        return self._ranks is None or self._ranks.is_leader

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; ids outside the tokenizer's vocabulary are skipped."""
        known = [token for token in token_ids if 0 <= token < self.tokenizer.vocab_size]
        return self.tokenizer.decode(known)

    def make_request(
        self,
        prompt: EncodedPrompt,
        sampling_params: SamplingParams,
        *,
        exits: Exits | None = None,
        strategy: Strategy | SelfSpeculation | Contrast = "exact",
        id: str | None = None,
    ) -> Request:
        """Return the request for an encoded prompt. Raises RequestError if it is not valid."""
        name, speculation, contrast = resolve_strategy(strategy, self.config)
        boundaries = self.config.exits.boundaries
        policy = self.policy
        if exits is not None:
            policy = resolve_policy(exits, boundaries, self._fingerprint_for)
        if contrast is not None and exits is not None and policy != policy.without_exits():
            raise RequestError(
                f"strategy {name!r} runs every token through all layers, so exits cannot have"
                " thresholds. Remove exits, or use exits='off'."
            )
        return Request(
            id or str(next(self._request_numbers)),
            prompt.token_ids,
            policy,
            sampling_params,
            name,
            speculation,
            self.tokenizer.eos_token_ids,
            self._encoder.special_texts(sampling_params.stop),
            contrast=contrast,
        )

    def stream_request(self, request: Request, prompt: str) -> TokenStream:
        """Return the token stream of a request. `prompt` is the text of its prompt.

        Raises RequestError if the request is not valid, or this rank is a worker.
        """
        self._check_open()
        self._check_leader()
        return TokenStream(self.engine, request, prompt, self.decode)

    def run(
        self, requests: Iterable[Request], prompts: Mapping[str, str]
    ) -> Generator[RequestOutput, None, None]:
        """Yield the output of each request as it finishes.

        Requests that are unfinished when the iterator is closed are aborted. A request that failed
        has the finish reason `error`, and the tokens and the text before the failure.

        Args:
            requests: The requests.
            prompts: The texts of their prompts, by request id.

        Raises:
            RequestError: A request is not valid, two have the same id, or this rank is a worker. In
                this case, none is served.
            RunError: Someone else aborted a request. The others are finished first.
        """
        self._check_open()
        self._check_leader()
        requests = list(requests)
        by_id = {request.id: request for request in requests}
        finished: set[str] = set()
        # If the caller fails, its traceback keeps the generators alive: close them explicitly.
        with closing(self.engine.run(requests)) as steps:
            for step in steps:
                if step.request_output is not None:
                    request = by_id[step.request_id]
                    finished.add(request.id)
                    yield self._with_text(step.request_output, request, prompts[request.id])
        for id in by_id:
            if id not in finished:
                raise RunError(f"Request {id!r} was aborted before its end.")

    def worker_loop(self) -> None:
        """Run passes for the leader until it closes the engine. Call this on all other ranks."""
        self._check_open()
        self.engine.worker_loop()

    def close(self) -> None:
        """Abort open streams, free the model and shut down the other ranks."""
        if not self._is_open:
            return
        self._is_open = False
        self.engine.abort_all()
        if self._finalize is not None:
            self._finalize.detach()
        if self._ranks is not None:
            self._closing.callback(self._ranks.shutdown)
            if self._ranks.is_leader:
                self._closing.callback(self.engine.close)
        self._closing.close()
        del self.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self._ranks is not None:
            self._abandon_ranks()
        else:
            self.close()

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return (
            f"LLM({str(self._reader.path)!r}, num_layers={self.config.model.num_layers},"
            f" exits={list(self.config.exits.boundaries)},"
            f" dtype={str(self.dtype).removeprefix('torch.')}{state})"
        )

    def _with_text(self, output: RequestOutput, request: Request, prompt: str) -> RequestOutput:
        """Return an output with its texts; tokens of a failed request may have no text."""
        text = GeneratedText.of_request(request, self.decode).complete(
            output.token_ids, skip_errors=output.error is not None
        )
        return replace(output, prompt=prompt, text=text.text, pieces=text.trimmed_pieces)

    def _connect(
        self, tensor: int, pipeline: int, timeout_s: float, arguments: dict[str, Any]
    ) -> None:
        distributed.refuse_second_group()
        self._has_workers = distributed.launched_world_size() is None
        with ExitStack() as stack:  # ends the workers if one of them fails
            if self._has_workers:
                distributed.check_gpus(tensor, pipeline)
                workers = Workers(tensor * pipeline, arguments)
                stack.callback(workers.close)
                workers.wait_until_ready(timeout_s)
            store = workers.store if self._has_workers else announce_ready()
            rank = 0 if self._has_workers else int(os.environ["RANK"])
            self._ranks = distributed.connect_serving(
                tensor=tensor, pipeline=pipeline, timeout_s=timeout_s, store=store, rank=rank
            )
            if self._has_workers:
                self._ranks.describe_lost = workers.describe_lost
                stack.callback(self._ranks.shutdown)
            self._closing = stack.pop_all()

    def _abandon_ranks(self) -> None:
        """End the workers without a message to them: they notice that this rank is gone.

        Ranks of a launcher notice that this process ends, after it has reported its error.
        """
        if not self._is_open:
            return
        self._is_open = False
        if self._finalize is not None:
            self._finalize()
        del self.engine

    def _check(
        self,
        tensor: int,
        pipeline: int,
        max_num_seqs: int,
        cache_tokens: int,
        timeout_s: float,
        quantize: Quantize,
    ) -> None:
        limits = {"tensor": 2**16, "pipeline": 2**16, "max_num_seqs": 2**14, "cache_tokens": 2**40}
        values = (tensor, pipeline, max_num_seqs, cache_tokens)
        for (name, most), value in zip(limits.items(), values, strict=True):
            if type(value) is not int or not 1 <= value <= most:
                raise RequestError(f"{name} = {value!r} must be an integer from 1 to {most}")
        seconds = plain_float(timeout_s)
        if seconds is None or not 0 < seconds <= 10**6:  # NaN fails too
            raise RequestError(
                f"timeout_s = {timeout_s!r} must be a number above 0 and at most {10**6}"
            )
        if quantize != "none":
            check_quantize(self.dtype)
        check_layout(self.config, tensor, pipeline)

    def _check_open(self) -> None:
        if not self._is_open:
            raise RequestError("This LLM is closed. Load the model again.")

    def _check_leader(self) -> None:
        if not self.is_leader:
            raise RequestError("This rank is a worker. Call worker_loop().")


def _abandon_ranks(closing: ExitStack, ranks: distributed.InferenceGrid) -> None:
    closing.close()
    # Threads that still run when Python shuts down would abort the process.
    ranks.join_listeners()


def _dtype(dtype: DtypeName | torch.dtype) -> torch.dtype:
    known = distributed.DTYPES
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    if isinstance(dtype, str) and (dtype == "auto" or dtype in known):
        return distributed.dtype_named(str(dtype))
    raise RequestError(f"dtype = {dtype!r} is unknown. Use one of auto, {', '.join(known)}.")
