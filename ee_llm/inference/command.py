"""`ee-llm generate`: prompts in, continuations out, with the exit of every token."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ee_llm import platform
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.data.tokenizer import Tokenizer, load_tokenizer
from ee_llm.inference.batch_file import append, finished_ids, open_output
from ee_llm.inference.decoder import Decoder, Update
from ee_llm.inference.engine import Engine
from ee_llm.inference.generator import Generation
from ee_llm.inference.options import GenerateOptions
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.policy import make_policy
from ee_llm.inference.prompts import Prompt, read_batch, read_prompt
from ee_llm.inference.records import as_json, to_record
from ee_llm.inference.render import colored_text, legend, token_pieces, token_table
from ee_llm.inference.request import Draft, Request
from ee_llm.inference.sampling import Sampling
from ee_llm.inference.scheduler import Limits
from ee_llm.inference.verify import Account, Checker


@dataclass(frozen=True)
class Session:
    """A model that is ready to decode, and what turns text into its tokens."""

    decoder: Decoder
    config: Config
    tokenizer: Tokenizer
    dtype: torch.dtype
    checker: Checker | None

    @property
    def dtype_name(self) -> str:
        """Return the dtype's name as options give it."""
        return str(self.dtype).removeprefix("torch.")

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`; the embedding may have more rows than there are tokens."""
        return self.tokenizer.decode([t for t in tokens if t < self.tokenizer.vocab_size])

    def request(self, prompt: Prompt) -> Request:
        """Return what is asked of the engine; raises ValueError, naming the line of a batch."""
        options, exits = prompt.options, self.config.exits.boundaries
        try:
            draft = None
            if options.strategy == "verify":
                if not exits:
                    raise ValueError("strategy 'verify' drafts at an exit, but the model has none")
                boundary = options.draft_exit or exits[0]
                draft = Draft(boundary, options.draft_length, options.draft_threshold)
            thresholds = [None if value == "off" else value for value in options.thresholds]
            return Request(
                prompt.id,
                tuple(self.tokenizer.encode(prompt.text)),
                make_policy(exits, thresholds, options.measure),
                Sampling(
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
                self.tokenizer.eod,
                stop_strings=options.stop,
            )
        except ValueError as error:
            if prompt.options.batch_file is None:
                raise
            raise ValueError(f"{prompt.where}: {error}") from None

    def text(self, generation: Generation, stops: tuple[str, ...]) -> str:
        """Return the new text, up to the stop string that ended it."""
        prompt = self.decode(list(generation.prompt))
        text = self.decode([*generation.prompt, *generation.tokens])[len(prompt) :]
        if generation.finish_reason == "stop":
            places = [place for stop in stops if (place := text.find(stop)) >= 0]
            text = text[: min(places, default=len(text))]
        return text


def generate(options: GenerateOptions) -> None:
    """Print or write the continuation of prompts; raises ValueError for bad input.

    Raises ValueError too, at the end, if --verify found what rounding does not explain.
    """
    if (options.batch_file is None) != (options.output is None):
        raise ValueError("--batch-file and --output belong together: give both or neither")
    reader = TensorReader(options.checkpoint)
    num_ranks = options.tensor * options.pipeline
    ranks = None
    if num_ranks > 1:
        ranks = platform.connect_serving(
            tensor=options.tensor, pipeline=options.pipeline, timeout_s=options.timeout_s
        )
    is_leader = ranks is None or ranks.is_leader
    prompts = []
    if is_leader:  # nobody else reads, so that mistakes are told once
        prompts = read_batch(options) if options.batch_file else [read_prompt(options)]
    with _opened(options, reader, ranks) as session:
        if not is_leader:
            session.decoder.follow()
        elif options.batch_file:
            _run_batch(session, options, prompts)
        else:
            _run_one(session, options, prompts[0])


@contextmanager
def _opened(
    options: GenerateOptions, reader: TensorReader, ranks: platform.ServingGrid | None
) -> Iterator[Session]:
    config = reader.config()
    tokenizer = load_tokenizer(reader.tokenizer())
    auto = options.dtype == "auto"
    dtype = platform.fast_dtype() if auto else platform.DTYPES[options.dtype]
    tensors = {name: reader.tensor(name) for name in reader.names()}
    session: Session

    def decode(tokens: list[int]) -> str:
        return session.decode(tokens)

    limits, device = _limits(options, config), platform.device()
    decoder: Decoder
    if ranks is not None and ranks.num_stages > 1:
        decoder = PipelineEngine(config, tensors, ranks, dtype, limits, decode, device)
    else:
        hold = options.hold if options.batch_file else "off"
        decoder = Engine(config, tensors, dtype, limits, decode, device, hold, ranks)
    checker = Checker(reader, dtype) if options.verify else None
    session = Session(decoder, config, tokenizer, dtype, checker)
    is_lost = False
    try:
        yield session
    except platform.RankLostError:
        is_lost = True  # there is nobody to take leave of
        raise
    finally:
        if ranks is not None and not is_lost:
            if ranks.is_leader:
                decoder.close()
            ranks.leave()


def _limits(options: GenerateOptions, config: Config) -> Limits:
    batch_size = options.batch_size if options.batch_file else 1
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    size = Limits.block_size
    num_positions = min(options.cache_tokens, batch_size * config.model.max_seq_length)
    num_blocks = -(-num_positions // size) + batch_size + 1  # ends of blocks, and the one to pad
    return Limits(batch_size, num_blocks, size)


def _run_one(session: Session, options: GenerateOptions, prompt: Prompt) -> None:
    with platform.console.status("generating") as status:  # on standard error, at a terminal only
        count = 0

        def show(update: Update) -> None:
            nonlocal count
            count += len(update.decisions)
            status.update(f"generating: {count} of {options.max_new_tokens} tokens")

        (generation,) = session.decoder.generate([session.request(prompt)], show)
    account = Account()
    if session.checker:
        account.add(prompt.where, session.checker.check(generation))
    pieces = token_pieces(session.decode, generation.prompt, generation.tokens)
    num_layers = session.config.model.num_layers
    if options.json:
        text = session.text(generation, options.stop)
        print(
            as_json(
                to_record(prompt.text, text, generation, num_layers, session.dtype_name, pieces)
            )
        )
    else:
        console = Console(highlight=False)
        console.print(colored_text(prompt.text, pieces, generation, num_layers), soft_wrap=True)
        if options.show_confidence:
            console.print(token_table(pieces, generation, num_layers))
        console.rule()
        console.print(legend(generation, num_layers), soft_wrap=True)
    if session.checker:
        account.tell()


def _run_batch(session: Session, options: GenerateOptions, prompts: list[Prompt]) -> None:
    assert options.output is not None, "a batch has an output"
    decoder, account = session.decoder, Account()
    requests = [session.request(prompt) for prompt in prompts]  # all mistakes before all work
    by_id = {prompt.id: prompt for prompt in prompts}
    start, num_tokens = time.monotonic(), 0
    with open_output(options.output) as file, _progress(len(prompts)) as progress:
        (task,) = progress.task_ids
        done = finished_ids(file, options.output)
        ahead = [request for request in requests if request.id not in done]
        progress.update(task, completed=len(prompts) - len(ahead))
        ahead.reverse()
        num_running = 0
        while ahead or num_running:
            while ahead and num_running < 2 * options.batch_size:
                decoder.add(ahead.pop())
                num_running += 1
            for update in decoder.step():
                num_tokens += len(update.decisions)
                if update.generation is None:
                    continue
                num_running -= 1
                prompt = by_id[update.id]
                if session.checker:
                    account.add(prompt.where, session.checker.check(update.generation))
                append(file, _record(session, prompt, update.generation))
                speed = num_tokens / (time.monotonic() - start)
                progress.update(task, advance=1, description=f"{speed:,.0f} tokens/s")
    seconds = time.monotonic() - start
    platform.log(
        f"{len(prompts)} prompts, {len(done & set(by_id))} of them done before; {num_tokens} tokens"
        f" in {seconds:.1f} s: {options.output}"
    )
    if session.checker:
        account.tell()


def _record(session: Session, prompt: Prompt, generation: Generation) -> dict[str, object]:
    text = session.text(generation, prompt.options.stop)
    num_layers = session.config.model.num_layers
    return to_record(prompt.text, text, generation, num_layers, session.dtype_name, id=prompt.id)


def _progress(total: int) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} prompts"),
        TimeRemainingColumn(),
        console=platform.console,
        transient=True,
        disable=not platform.console.is_terminal,
    )
    progress.add_task("generating", total=total)
    return progress
