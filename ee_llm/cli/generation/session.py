"""A model that is ready to decode, and what turns prompts into its tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.cli.generation.prompt_tokens import PromptEncoder
from ee_llm.cli.generation.prompts import Prompt
from ee_llm.config import Config
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.errors import UserError
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig, Quantize
from ee_llm.inference.execution.paged_attention import FLASH_BLOCK
from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.load import load_engine
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.sampler import SamplingParams
from ee_llm.inference.scheduling.scheduler import SchedulerConfig
from ee_llm.inference.strategies import SelfSpeculation
from ee_llm.inference.text.detokenizer import GeneratedText, generated_text
from ee_llm.inference.text.records import Record, origin
from ee_llm.inference.verification.reference_decoding import RequestOutput


@dataclass(frozen=True)
class Session:
    """An engine with a model, its tokenizer, and the names of both for records."""

    decoder: EngineBase
    config: Config
    tokenizer: Tokenizer
    encoder: PromptEncoder
    dtype: torch.dtype
    checkpoint: str
    model: str
    quantize: Quantize = "none"

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`; the embedding may have more rows than there are tokens."""
        return decoded(self.tokenizer, tokens)

    def request(self, prompt: Prompt) -> Request:
        """Return the request for an encoded prompt; raises UserError for what no model can do."""
        options, exits = prompt.options, self.config.exits.boundaries
        draft = None
        if options.strategy == "self-speculative":
            if not exits:
                raise UserError(
                    "strategy 'self-speculative' drafts at an exit, but the model has none. Add"
                    " exits with 'ee-llm checkpoint add-exits' or with --exits of 'ee-llm"
                    " convert', then tune them with 'ee-llm tune'."
                )
            boundary = exits[0] if options.draft_exit is None else options.draft_exit
            draft = SelfSpeculation(boundary, options.draft_length, options.draft_threshold)
        thresholds = [None if value == "off" else value for value in options.thresholds]
        return Request(
            prompt.id,
            prompt.token_ids,
            make_exit_policy(exits, thresholds, options.measure),
            SamplingParams(
                options.temperature,
                options.top_k,
                options.top_p,
                options.seed,
                options.min_p,
                options.repetition_penalty,
            ),
            options.strategy,
            draft,
            options.max_new_tokens,
            () if options.ignore_eos else self.tokenizer.eos_token_ids,
            options.stop_token_ids,
            options.stop,
            self.encoder.special_texts(options.stop),
        )

    def origin(self, prompt: Prompt, request: Request) -> Record:
        """Return what the continuation of a prompt is a function of."""
        dtype = str(self.dtype).removeprefix("torch.")
        made_of = origin(prompt.text, request, dtype, self.checkpoint, self.model)
        if prompt.messages:
            made_of |= {"messages": list(prompt.messages)}
        return made_of if self.quantize == "none" else made_of | {"quantize": self.quantize}

    def begin_text(self, request: Request) -> GeneratedText:
        """Return the text of a request's continuation, which has no token yet."""
        special = dict(request.special_texts)
        return GeneratedText(self.decode, request.prompt, request.stop_strings, special)

    def text(self, generation: RequestOutput, request: Request) -> str:
        """Return the new text, up to the stop string that ended it."""
        stops, special = request.stop_strings, dict(request.special_texts)
        return generated_text(
            self.decode, generation.prompt, generation.tokens, stops, special
        ).text


def decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text of those tokens that the tokenizer has."""
    return tokenizer.decode([token for token in tokens if 0 <= token < tokenizer.vocab_size])


@contextmanager
def open_session(
    options: GenerateOptions, reader: TensorReader, tokenizer: Tokenizer, encoder: PromptEncoder
) -> Iterator[Session]:
    """Give a model on all ranks, and take leave of them if all went well.

    Otherwise this rank just ends, which the others notice.
    """
    ranks = None
    if options.tensor * options.pipeline > 1:
        ranks = distributed.connect_serving(
            tensor=options.tensor, pipeline=options.pipeline, timeout_s=options.timeout_s
        )
    config = reader.config()
    dtype = distributed.dtype_named(options.dtype)

    def decode(tokens: list[int]) -> str:
        return decoded(tokenizer, tokens)

    deferral = options.deferral if options.batch_file else "off"
    execution = ExecutionConfig(
        options.attention, options.graphs, options.compile, options.quantize
    )
    scheduler_config = _limits(options, config)
    decoder = load_engine(reader, dtype, scheduler_config, decode, deferral, ranks, execution)
    names = reader.path.name, reader.fingerprint()
    yield Session(decoder, config, tokenizer, encoder, dtype, *names, options.quantize)
    if ranks is not None:
        if ranks.is_leader:
            decoder.close()
        ranks.shutdown()


def open_encoder(options: GenerateOptions, reader: TensorReader) -> tuple[Tokenizer, PromptEncoder]:
    """Return a checkpoint's tokenizer, and what turns prompts into its tokens."""
    tokenizer = load_tokenizer(reader.tokenizer(), reader.config().data.eos_token)
    return tokenizer, PromptEncoder(tokenizer, stated_bos(reader.path), options.chat_template)


def _limits(options: GenerateOptions, config: Config) -> SchedulerConfig:
    batch_size = options.batch_size if options.batch_file else 1
    size = FLASH_BLOCK if options.attention == "flash" else SchedulerConfig.block_size
    num_positions = min(options.cache_tokens, batch_size * config.model.max_seq_length)
    num_blocks = -(-num_positions // size) + batch_size + 1  # ends of blocks, and the one to pad
    return SchedulerConfig(batch_size, num_blocks, size)
