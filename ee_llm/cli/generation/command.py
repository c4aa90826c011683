"""`ee-llm generate`: prompts in, continuations out, with the exit of every token."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.generation.batch_file import append, open_output
from ee_llm.cli.generation.live import LiveText
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.cli.generation.prompt_tokens import PromptEncoder
from ee_llm.cli.generation.prompts import InvalidLine, Prompt, read_prompts
from ee_llm.cli.generation.render import legend, speed_line, token_table
from ee_llm.cli.generation.session import Session, open_encoder, open_session
from ee_llm.cli.generation.verify import Account, Checker, check_file
from ee_llm.errors import RunError, UserError
from ee_llm.inference.engine_base import StepOutput
from ee_llm.inference.execution.quantization import check_quantize
from ee_llm.inference.execution.stage import check_layout
from ee_llm.inference.request import Request
from ee_llm.inference.speed import Speed, Stopwatch, against_full
from ee_llm.inference.text.records import as_json, error_record, to_record
from ee_llm.inference.verification.reference_decoding import RequestOutput

# Far more than is of use; beyond it lists, tensors and time-outs overflow.
_MOST: dict[str, int] = {
    "tensor": 2**16,
    "pipeline": 2**16,
    "batch_size": 2**14,
    "cache_tokens": 2**40,
    "timeout_s": 10**6,
}


def check(options: GenerateOptions) -> None:
    """Refuse what can be seen to fail before a process is started; raises UserError."""
    kinds = ("prompt", "prompt_file", "prompt_ids", "chat", "chat_file", "batch_file")
    given = [name for name in kinds if getattr(options, name) not in (None, ())]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{names} are both given; leave one out")
    for name in ("system", "chat_template"):
        if getattr(options, name) is not None and not {"chat", "chat_file", "batch_file"} & {
            *given
        }:
            kind = "--" + given[0].replace("_", "-") if given else "standard input"
            raise UserError(
                f"--{name.replace('_', '-')} is for conversations, not for {kind}; use --chat, or"
                " leave it out"
            )
    if (options.batch_file is None) != (options.output is None):
        raise UserError("--batch-file and --output belong together: give both or neither")
    if options.batch_file is not None and (options.json or options.show_confidence):
        raise UserError("--json and --show-confidence are for one prompt; a batch is in --output")
    for name, most in _MOST.items():
        value = getattr(options, name)
        if not 1 <= value <= most:  # NaN fails too
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value} must be at least 1 and at most {most}")
    num_ranks, started = options.tensor * options.pipeline, distributed.launched_world_size()
    if started is not None and started != num_ranks:
        raise UserError(
            f"--tensor {options.tensor} x --pipeline {options.pipeline} do not fit WORLD_SIZE ="
            f" {started} in the environment; start {num_ranks} ranks, or unset it"
        )
    if options.quantize != "none":
        check_quantize(distributed.dtype_named(options.dtype))
        if options.verify:
            raise UserError(
                "--verify holds generations against the checkpoint's weights, and --quantize "
                "int8 has others; leave one out"
            )
    check_layout(TensorReader(options.checkpoint).config(), options.tensor, options.pipeline)
    num_gpus = distributed.num_gpus()
    if started is None and 0 < num_gpus < num_ranks:
        raise UserError(
            f"--tensor {options.tensor} x --pipeline {options.pipeline} takes {num_ranks} GPUs, and"
            f" this machine has {num_gpus}. Use fewer ranks, or set CUDA_VISIBLE_DEVICES= to"
            " compute on the CPU."
        )


def generate(options: GenerateOptions) -> None:
    """Print or write the continuation of prompts.

    Raises UserError for bad input, and at the end if --verify found what rounding does not
    explain; RuntimeError, at the end too, if prompts of a batch have error records.
    """
    check(options)
    reader = TensorReader(options.checkpoint)
    tokenizer, encoder = open_encoder(options, reader)
    if not distributed.is_rank_zero():  # nobody else reads, so that mistakes are told once
        with open_session(options, reader, tokenizer, encoder) as session:
            session.decoder.follow()
        return
    prompts = read_prompts(options)
    if not tokenizer.eos_token_ids and not options.ignore_eos:
        distributed.console.print(
            f"warning: no end token is known for tokenizer {escape(tokenizer.name)}, so that only"
            " --max-new-tokens ends a continuation; give one with --stop-token-ids",
            soft_wrap=True,
        )
    if options.batch_file is not None:
        lines = [_encoded(encoder, line) for line in prompts]
        with open_session(options, reader, tokenizer, encoder) as session:
            errors = _run_batch(session, options, lines)
        _end_batch(options, reader, lines, errors)
        return
    (prompt,) = prompts
    assert isinstance(prompt, Prompt), "lines alone are invalid, and this is no batch"
    prompt = encoder.encode(prompt)
    with open_session(options, reader, tokenizer, encoder) as session:
        generation = _run_one(session, options, prompt)
    if options.verify:
        account = Account()
        checker = Checker(reader, distributed.dtype_named(options.dtype))
        account.add(prompt.where, checker.check(generation))
        account.tell()


def _encoded(encoder: PromptEncoder, line: Prompt | InvalidLine) -> Prompt | InvalidLine:
    """Return a line of a batch with its token ids, or why it has none."""
    if isinstance(line, InvalidLine):
        return line
    try:
        return encoder.encode(line)
    except ValueError as error:
        return InvalidLine(line.id, line.where, f"{line.where}: {error}")


def _end_batch(
    options: GenerateOptions,
    reader: TensorReader,
    lines: list[Prompt | InvalidLine],
    errors: dict[str, str],
) -> None:
    """Check what was written if --verify asks for it, and raise RunError if lines failed."""
    assert options.output is not None, "a batch has an output"
    if options.verify:
        ids = {line.id for line in lines}
        check_file(reader, options.output, f"--output {options.output}", ids).tell()
    if errors:
        raise RunError(
            f"{len(errors)} of {len(lines)} prompts failed; --output {options.output} has an error"
            f" record for each. The first: {next(iter(errors.values()))}"
        )


def _run_one(session: Session, options: GenerateOptions, prompt: Prompt) -> RequestOutput:
    request = session.request(prompt)
    num_layers = session.config.model.num_layers
    text, stopwatch = session.begin_text(request), Stopwatch()
    console = Console(highlight=False, quiet=options.json)
    policy = request.policy.under(request.strategy)
    live = LiveText(console, text, policy, num_layers)

    def show(output: StepOutput) -> None:
        if not stopwatch.is_running and not prompt.messages:
            live.prompt(prompt.text)  # here, since a request may be refused
        stopwatch.tick(len(output.token_outputs))
        live.show(output.token_outputs)

    try:
        (generation,) = session.decoder.generate([request], show)
        shown = live.finish()
    finally:
        if stopwatch.is_running:
            console.print()  # whatever comes next begins on a line of its own
    if generation.error is not None:
        raise RunError(f"{prompt.where}: {generation.error}")
    speed = stopwatch.speed()
    if options.strategy == "self-speculative":
        speed = against_full(speed, session.decoder, [(request, generation)])
    if options.json:
        made_of = session.origin(prompt, request)
        record = to_record(made_of, shown, generation, num_layers, text.pieces, speed=speed)
        print(as_json(record))
    if options.show_confidence:
        console.print(token_table(text.pieces, generation, num_layers))
    console.rule()
    console.print(legend(generation, num_layers, speed), soft_wrap=True)
    _warn(speed)
    return generation


def _warn(speed: Speed) -> None:
    """Say on standard error that drafting does not pay, if it does not."""
    if (warning := speed.warning()) is not None:
        distributed.console.print(f"warning: {escape(warning)}", soft_wrap=True)


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
    drafted: list[tuple[Request, RequestOutput]] = []
    count = TextColumn("{task.completed}/{task.total} prompts")
    bar = distributed.progress_bar("generating", len(requests), count)
    with open_output(options.output, origins) as (file, done), bar as progress:
        (task,) = progress.task_ids
        num_done = len(done & requests.keys())
        progress.update(task, completed=num_done)
        for id, request in requests.items():
            if id not in done:
                session.decoder.add(request)
        while session.decoder.has_work:
            for output in session.decoder.step():
                num_tokens += len(output.token_outputs)
                if output.generation is None:
                    continue
                if output.generation.error is not None:
                    errors[output.id] = f"{by_id[output.id].where}: {output.generation.error}"
                    continue
                text = session.text(output.generation, requests[output.id])
                if output.generation.strategy == "self-speculative":
                    drafted.append((requests[output.id], output.generation))
                made_of = origins[output.id]
                record = to_record(made_of, text, output.generation, num_layers, id=output.id)
                append(file, record)
                per_second = num_tokens / (time.monotonic() - start)
                progress.update(task, advance=1, description=f"{per_second:,.0f} tokens/s")
        for id, message in errors.items():
            append(file, error_record(id, message))
    seconds = time.monotonic() - start
    distributed.console.print(
        f"{len(lines)} prompts, {num_done} of them done before; {num_tokens} tokens in"
        f" {seconds:.1f} s: {escape(str(options.output))}",
        soft_wrap=True,
    )
    if drafted:
        speed = against_full(Speed(), session.decoder, drafted, options.batch_size)
        distributed.console.print(f"self-speculation: {speed_line(speed)}", soft_wrap=True)
        _warn(speed)
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
