"""`ee-llm generate`: prompts in, continuations out, with the exit of every token."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ee_llm import platform
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.config import Config
from ee_llm.data.tokenizer import Tokenizer, load_tokenizer
from ee_llm.inference.batch_file import append, open_output
from ee_llm.inference.decoder import Decoder, Update
from ee_llm.inference.execution import Execution, Quantize
from ee_llm.inference.generator import Generation
from ee_llm.inference.load import load_engine
from ee_llm.inference.options import GenerateOptions
from ee_llm.inference.paged import FLASH_BLOCK
from ee_llm.inference.policy import make_policy
from ee_llm.inference.prompts import InvalidLine, Prompt, first_tokens, read_prompts
from ee_llm.inference.quantized import check_quantize
from ee_llm.inference.records import Record, as_json, error_record, origin, to_record
from ee_llm.inference.render import colored_text, cut_pieces, legend, token_pieces, token_table
from ee_llm.inference.request import Draft, Request
from ee_llm.inference.sampling import Sampling
from ee_llm.inference.scheduler import Limits
from ee_llm.inference.stage import cut
from ee_llm.inference.verify import Account, Checker, check_file


@dataclass(frozen=True)
class Session:
    """A model that is ready to decode, and what turns text into its tokens."""

    decoder: Decoder
    config: Config
    tokenizer: Tokenizer
    dtype: torch.dtype
    checkpoint: str
    model: str
    states_bos: bool | None = None
    quantize: Quantize = "none"

    def decode(self, tokens: list[int]) -> str:
        """Return the text of `tokens`; the embedding may have more rows than there are tokens."""
        return self.tokenizer.decode([t for t in tokens if t < self.tokenizer.vocab_size])

    def request(self, prompt: Prompt) -> Request:
        """Return what is asked of the engine; raises ValueError for what no model can do."""
        options, exits = prompt.options, self.config.exits.boundaries
        draft = None
        if options.strategy == "verify":
            if not exits:
                raise ValueError("strategy 'verify' drafts at an exit, but the model has none")
            boundary = exits[0] if options.draft_exit is None else options.draft_exit
            draft = Draft(boundary, options.draft_length, options.draft_threshold)
        first = first_tokens(options.bos, self.tokenizer, self.states_bos)
        thresholds = [None if value == "off" else value for value in options.thresholds]
        return Request(
            prompt.id,
            (*first, *self.tokenizer.encode(prompt.text)),
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
            self.tokenizer.eos_token_ids,
            stop_strings=options.stop,
        )

    def origin(self, prompt: Prompt, request: Request) -> Record:
        """Return what the continuation of a prompt is a function of."""
        dtype = str(self.dtype).removeprefix("torch.")
        made_of = origin(prompt.text, request, dtype, self.checkpoint, self.model)
        return made_of if self.quantize == "none" else made_of | {"quantize": self.quantize}

    def text(self, generation: Generation, stops: tuple[str, ...]) -> str:
        """Return the new text, up to the stop string that ended it."""
        prompt = self.decode(list(generation.prompt))
        text = self.decode([*generation.prompt, *generation.tokens])[len(prompt) :]
        if generation.finish_reason == "stop":
            places = [place for stop in stops if (place := text.find(stop)) >= 0]
            text = text[: min(places, default=len(text))]
        return text


def check(options: GenerateOptions) -> None:
    """Refuse what can be seen to fail before a process is started; raises ValueError."""
    given = [n for n in ("prompt", "prompt_file", "batch_file") if getattr(options, n) is not None]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} are both given; leave one out")
    if (options.batch_file is None) != (options.output is None):
        raise ValueError("--batch-file and --output belong together: give both or neither")
    if options.batch_file is not None and (options.json or options.show_confidence):
        raise ValueError("--json and --show-confidence are for one prompt; a batch is in --output")
    for name in ("tensor", "pipeline", "batch_size", "cache_tokens"):
        if getattr(options, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)} must be at least 1")
    if not 0.0 < options.timeout_s < math.inf:
        raise ValueError(f"--timeout-s {options.timeout_s} must be finite and more than 0")
    num_ranks, started = options.tensor * options.pipeline, platform.launched_world_size()
    if started is not None and started != num_ranks:
        raise ValueError(
            f"--tensor {options.tensor} x --pipeline {options.pipeline} do not fit WORLD_SIZE ="
            f" {started} in the environment; start {num_ranks} ranks, or unset it"
        )
    if options.quantize != "none":
        check_quantize(platform.dtype_named(options.dtype))
        if options.verify:
            raise ValueError(
                "--verify holds generations against the checkpoint's weights, and --quantize "
                "int8 has others; leave one out"
            )
    config = TensorReader(options.checkpoint).config()
    cut(config, options.pipeline)
    if options.tensor > config.model.num_kv_heads:
        raise ValueError(
            f"--tensor {options.tensor} is more than model.num_kv_heads ="
            f" {config.model.num_kv_heads}, which can not be shared out to so many"
        )


def generate(options: GenerateOptions) -> None:
    """Print or write the continuation of prompts.

    Raises ValueError for bad input, and at the end if --verify found what rounding does not
    explain; RuntimeError, at the end too, if prompts of a batch have error records.
    """
    check(options)
    reader = TensorReader(options.checkpoint)
    if not platform.is_rank_zero():  # nobody else reads, so that mistakes are told once
        with _opened(options, reader) as session:
            session.decoder.follow()
    elif options.batch_file is not None:
        _generate_batch(options, reader)
    else:
        _generate_one(options, reader)


def _generate_one(options: GenerateOptions, reader: TensorReader) -> None:
    (prompt,) = read_prompts(options)
    assert isinstance(prompt, Prompt), "lines alone are invalid, and this is no batch"
    with _opened(options, reader) as session:
        generation = _run_one(session, options, prompt)
    if options.verify:
        account = Account()
        checker = Checker(reader, platform.dtype_named(options.dtype))
        account.add(prompt.where, checker.check(generation))
        account.tell()


def _generate_batch(options: GenerateOptions, reader: TensorReader) -> None:
    assert options.output is not None, "a batch has an output"
    lines = read_prompts(options)
    with _opened(options, reader) as session:
        errors = _run_batch(session, options, lines)
    if options.verify:
        ids = {line.id for line in lines}
        check_file(reader, options.output, f"--output {options.output}", ids).tell()
    if errors:
        raise RuntimeError(
            f"{len(errors)} of {len(lines)} prompts failed; --output {options.output} has an error"
            f" record for each. The first: {next(iter(errors.values()))}"
        )


@contextmanager
def _opened(options: GenerateOptions, reader: TensorReader) -> Iterator[Session]:
    """Give a model on all ranks, and take leave of them if all went well.

    Otherwise this rank just ends, which the others notice.
    """
    ranks = None
    if options.tensor * options.pipeline > 1:
        ranks = platform.connect_serving(
            tensor=options.tensor, pipeline=options.pipeline, timeout_s=options.timeout_s
        )
    config = reader.config()
    tokenizer, dtype = load_tokenizer(reader.tokenizer()), platform.dtype_named(options.dtype)
    session: Session

    def decode(tokens: list[int]) -> str:
        return session.decode(tokens)

    hold = options.hold if options.batch_file else "off"
    execution = Execution(options.attention, options.graphs, options.compile, options.quantize)
    limits = _limits(options, config)
    decoder = load_engine(reader, dtype, limits, decode, hold, ranks, execution)
    names = reader.path.name, reader.fingerprint()
    bos = stated_bos(reader.path)
    session = Session(decoder, config, tokenizer, dtype, *names, bos, options.quantize)
    yield session
    if ranks is not None:
        if ranks.is_leader:
            decoder.close()
        ranks.leave()


def _limits(options: GenerateOptions, config: Config) -> Limits:
    batch_size = options.batch_size if options.batch_file else 1
    size = FLASH_BLOCK if options.attention == "flash" else Limits.block_size
    num_positions = min(options.cache_tokens, batch_size * config.model.max_seq_length)
    num_blocks = -(-num_positions // size) + batch_size + 1  # ends of blocks, and the one to pad
    return Limits(batch_size, num_blocks, size)


def _run_one(session: Session, options: GenerateOptions, prompt: Prompt) -> Generation:
    request = session.request(prompt)
    with platform.console.status("generating") as status:  # on standard error, at a terminal only
        count = 0

        def show(update: Update) -> None:
            nonlocal count
            count += len(update.decisions)
            status.update(f"generating: {count} of {options.max_new_tokens} tokens")

        (generation,) = session.decoder.generate([request], show)
    if generation.error is not None:
        raise RuntimeError(f"{prompt.where}: {generation.error}")
    pieces = token_pieces(session.decode, generation.prompt, generation.tokens)
    text = session.text(generation, options.stop)
    num_layers = session.config.model.num_layers
    if options.json:
        made_of = session.origin(prompt, request)
        print(as_json(to_record(made_of, text, generation, num_layers, pieces)))
        return generation
    console = Console(highlight=False)
    shown = cut_pieces(pieces, len(text))
    console.print(colored_text(prompt.text, shown, generation, num_layers), soft_wrap=True)
    if options.show_confidence:
        console.print(token_table(pieces, generation, num_layers))
    console.rule()
    console.print(legend(generation, num_layers), soft_wrap=True)
    return generation


def _run_batch(
    session: Session, options: GenerateOptions, lines: list[Prompt | InvalidLine]
) -> dict[str, str]:
    """Write a record for each line; return the message of each that failed, by id."""
    assert options.output is not None, "a batch has an output"
    by_id = {line.id: line for line in lines if isinstance(line, Prompt)}
    requests, errors = _requests(session, lines)
    origins = {id: session.origin(by_id[id], request) for id, request in requests.items()}
    num_layers = session.config.model.num_layers
    start, num_tokens = time.monotonic(), 0
    count = TextColumn("{task.completed}/{task.total} prompts")
    bar = platform.progress_bar("generating", len(requests), count)
    with open_output(options.output, origins) as (file, done), bar as progress:
        (task,) = progress.task_ids
        num_done = len(done & requests.keys())
        progress.update(task, completed=num_done)
        for id, request in requests.items():
            if id not in done:
                session.decoder.add(request)
        while session.decoder.has_work:
            for update in session.decoder.step():
                num_tokens += len(update.decisions)
                if update.generation is None:
                    continue
                if update.generation.error is not None:
                    errors[update.id] = f"{by_id[update.id].where}: {update.generation.error}"
                    continue
                text = session.text(update.generation, by_id[update.id].options.stop)
                made_of = origins[update.id]
                record = to_record(made_of, text, update.generation, num_layers, id=update.id)
                append(file, record)
                speed = num_tokens / (time.monotonic() - start)
                progress.update(task, advance=1, description=f"{speed:,.0f} tokens/s")
        for id, message in errors.items():
            append(file, error_record(id, message))
    seconds = time.monotonic() - start
    platform.console.print(
        f"{len(lines)} prompts, {num_done} of them done before; {num_tokens} tokens in"
        f" {seconds:.1f} s: {escape(str(options.output))}",
        soft_wrap=True,
    )
    return errors


def _requests(
    session: Session, lines: list[Prompt | InvalidLine]
) -> tuple[dict[str, Request], dict[str, str]]:
    """Return the requests of the lines that can be served, and why the others cannot, by id."""
    requests: dict[str, Request] = {}
    errors: dict[str, str] = {}
    for line in lines:
        if isinstance(line, InvalidLine):
            errors[line.id] = line.error
            continue
        try:
            request = session.request(line)
            session.decoder.add(request)
            session.decoder.abort(request.id)
            requests[line.id] = request
        except ValueError as error:
            errors[line.id] = f"{line.where}: {error}"
    return requests, errors
