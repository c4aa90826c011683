"""`ee-llm generate`: generate text for prompts, with the exit of every token."""

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.generation.batch_file import append, open_output
from ee_llm.cli.generation.execution import check_execution, load_model
from ee_llm.cli.generation.live import LiveText
from ee_llm.cli.generation.options import GenerateOptions
from ee_llm.cli.generation.prompts import InvalidLine, Prompt, read_prompts
from ee_llm.cli.generation.render import legend, speed_line, token_table
from ee_llm.cli.generation.strategies import check_strategy_options, strategy_of_options
from ee_llm.cli.generation.verify import print_report, read_outputs
from ee_llm.errors import RunError, UserError
from ee_llm.inference.decoding.settings import CONTRASTS, Contrast, resolve_contrast
from ee_llm.inference.exits.policy import Exits, make_exit_policy
from ee_llm.inference.llm import LLM
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.speed import Speed, Stopwatch, against_full
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from ee_llm.inference.text.records import Record, as_json, error_record, origin, to_record
from ee_llm.inference.verification.verify import Verifier

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens",
    "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs",
)  # fmt: skip


def check(options: GenerateOptions) -> None:
    """Raise UserError for invalid options, before any process is started."""
    kinds = ("prompt", "prompt_file", "prompt_token_ids", "chat", "chat_file", "batch_file")
    given = [name for name in kinds if getattr(options, name) not in (None, ())]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{names} are both given. Use one of them.")
    for name in ("system", "chat_template"):
        if getattr(options, name) is not None and not {"chat", "chat_file", "batch_file"} & {
            *given
        }:
            kind = "--" + given[0].replace("_", "-") if given else "standard input"
            raise UserError(
                f"--{name.replace('_', '-')} applies to conversations, not to {kind}. Use --chat,"
                " or remove it."
            )
    if (options.batch_file is None) != (options.output is None):
        raise UserError("--batch-file and --output need each other. Give both or neither.")
    if options.batch_file is not None and (options.json or options.show_confidence):
        raise UserError(
            "--json and --show-confidence apply to one prompt; the results of a --batch-file are in"
            " --output. Remove them."
        )
    if options.policy is not None and options.thresholds != GenerateOptions.thresholds:
        raise UserError(
            f"--policy {options.policy} and --thresholds are both given. Use one of them."
        )
    if options.quantize != "none" and options.verify:
        raise UserError(
            "--verify checks generations with the checkpoint's weights, but --quantize"
            f" {options.quantize} changes the weights. Remove one of them."
        )
    config = check_execution(options)
    if options.batch_file is None:
        check_strategy_options(options)
        strategy = strategy_of_options(options)
        if isinstance(strategy, Contrast):
            resolve_contrast(strategy, config)


def generate(options: GenerateOptions) -> None:
    """Print or write the continuation of prompts.

    Raises:
        UserError: The input is invalid, or --verify found a divergence beyond rounding.
        RunError: Prompts of a batch failed. Raised at the end, when all others are written.
    """
    check(options)
    # Only rank 0 reads prompts, so that errors are reported once.
    prompts = read_prompts(options) if distributed.is_rank_zero() else []
    with _open(options) as llm:
        if not llm.is_leader:
            llm.worker_loop()
            return
        if not llm.tokenizer.eos_token_ids and not options.ignore_eos:
            distributed.console.print(
                f"warning: tokenizer {escape(llm.tokenizer.name)} has no known end token, so only"
                " --max-tokens ends the output. Give an end token with --stop-token-ids.",
                soft_wrap=True,
            )
        if options.batch_file is not None:
            errors = _run_batch(llm, options, prompts)
        else:
            (prompt,) = prompts
            assert isinstance(prompt, Prompt), "only lines of a batch can be invalid"
            output = _run_one(llm, options, prompt)
    if options.batch_file is not None:
        _end_batch(options, prompts, errors)
    elif options.verify:
        found = [(replace(output, request_id=prompt.where), llm.dtype)]
        print_report(Verifier(TensorReader(options.checkpoint)).verify(found))


def _open(options: GenerateOptions) -> LLM:
    if options.batch_file is not None:
        return load_model(options, deferral=options.deferral)
    return load_model(options, max_num_seqs=1, deferral="off")


def _request(llm: LLM, prompt: Prompt, encoded: EncodedPrompt) -> Request:
    options = prompt.options
    return llm.make_request(
        encoded,
        SamplingParams(**{name: getattr(options, name) for name in _SAMPLING}),
        exits=_exits(llm, options),
        strategy=strategy_of_options(options),
        id=prompt.id,
    )


def _exits(llm: LLM, options: GenerateOptions) -> Exits:
    if options.strategy in CONTRASTS:
        return make_exit_policy(llm.config.exits.boundaries, [None])
    if options.policy is not None:
        return Path(options.policy)
    thresholds = [None if value == "off" else value for value in options.thresholds]
    return make_exit_policy(llm.config.exits.boundaries, thresholds, options.measure)


def _origin(llm: LLM, prompt: Prompt, encoded: EncodedPrompt, request: Request) -> Record:
    dtype = str(llm.dtype).removeprefix("torch.")
    found = origin(encoded.text, request, dtype, llm.checkpoint.name, llm.fingerprint)
    if prompt.messages:
        found |= {"messages": list(prompt.messages)}
    quantize = prompt.options.quantize
    return found if quantize == "none" else found | {"quantize": quantize}


def _run_one(llm: LLM, options: GenerateOptions, prompt: Prompt) -> RequestOutput:
    encoded = prompt.encode(llm.encoder)
    request = _request(llm, prompt, encoded)
    stopwatch = Stopwatch()
    console = Console(highlight=False, quiet=options.json)
    try:
        with llm.stream_request(request, encoded.text) as stream:
            policy = request.policy.under(request.strategy)
            live = LiveText(console, stream.generated, policy, llm.config.model.num_layers)
            for token in stream:
                if not stopwatch.is_running and not prompt.messages:
                    live.prompt(encoded.text)
                stopwatch.tick(1)
                live.show(token.exit)
            live.finish()
    except distributed.RankLostError:
        raise
    except RunError as error:
        raise RunError(f"{prompt.where}: {error}") from None
    finally:
        if stopwatch.is_running:
            console.print()  # Later output starts on a new line.
    output = stream.output
    assert output is not None, "the stream is finished"
    speed = stopwatch.speed()
    if output.strategy == "self-speculative":
        speed = against_full(speed, llm.engine, [(request, output)])
    if options.json:
        source = _origin(llm, prompt, encoded, request)
        print(as_json(to_record(source, output, speed=speed, with_pieces=True)))
    if options.show_confidence:
        console.print(token_table(output))
    console.rule()
    console.print(legend(output, speed), soft_wrap=True)
    _warn(speed)
    return output


def _warn(speed: Speed) -> None:
    """Print a warning to standard error if drafting does not pay."""
    if (warning := speed.warning()) is not None:
        distributed.console.print(f"warning: {escape(warning)}", soft_wrap=True)


def _run_batch(
    llm: LLM, options: GenerateOptions, lines: list[Prompt | InvalidLine]
) -> dict[str, str]:
    """Write a record for each line; return the message of each that failed, by id."""
    assert options.output is not None, "a batch has an output"
    where = {line.id: line.where for line in lines}
    requests, origins, errors = _requests(llm, lines)
    texts = {id: origins[id]["prompt"] for id in requests}
    start, num_tokens = time.monotonic(), 0
    drafted: list[tuple[Request, RequestOutput]] = []
    count = TextColumn("{task.completed}/{task.total} prompts")
    bar = distributed.progress_bar("generating", len(requests), count)
    with open_output(options.output, origins) as (file, done), bar as progress:
        (task,) = progress.task_ids
        num_done = len(done & requests.keys())
        progress.update(task, completed=num_done)
        for output in llm.run([one for id, one in requests.items() if id not in done], texts):
            id = output.request_id
            num_tokens += len(output.token_ids)
            if output.error is not None:
                errors[id] = f"{where[id]}: {output.error}"
                continue
            if output.strategy == "self-speculative":
                drafted.append((requests[id], output))
            append(file, to_record(origins[id], output, id))
            per_second = num_tokens / (time.monotonic() - start)
            progress.update(task, advance=1, description=f"{per_second:,.0f} tokens/s")
        for id, message in errors.items():
            append(file, error_record(id, message))
    seconds = time.monotonic() - start
    distributed.console.print(
        f"{len(lines)} prompts, {num_done} of them from an earlier run; {num_tokens} tokens in"
        f" {seconds:.1f} s: {escape(str(options.output))}",
        soft_wrap=True,
    )
    if drafted:
        speed = against_full(Speed(), llm.engine, drafted, options.max_num_seqs)
        distributed.console.print(f"self-speculation: {speed_line(speed)}", soft_wrap=True)
        _warn(speed)
    return errors


def _requests(
    llm: LLM, lines: list[Prompt | InvalidLine]
) -> tuple[dict[str, Request], dict[str, Record], dict[str, str]]:
    """Return the requests and origins of valid lines, and the errors of the others, by id."""
    requests: dict[str, Request] = {}
    origins: dict[str, Record] = {}
    errors: dict[str, str] = {}
    for line in lines:
        if isinstance(line, InvalidLine):
            errors[line.id] = line.error
            continue
        try:
            encoded = line.encode(llm.encoder)
            request = _request(llm, line, encoded)
            llm.engine.add(request)  # also checks that the cache is large enough
            llm.engine.abort(request.id)
        except ValueError as error:
            errors[line.id] = f"{line.where}: {error}"
            continue
        requests[line.id] = request
        origins[line.id] = _origin(llm, line, encoded, request)
    return requests, origins, errors


def _end_batch(
    options: GenerateOptions, lines: list[Prompt | InvalidLine], errors: dict[str, str]
) -> None:
    """Check the output if --verify is given, and raise RunError if lines failed."""
    assert options.output is not None, "a batch has an output"
    if options.verify:
        ids = {line.id for line in lines}
        outputs = read_outputs(options.output, f"--output {options.output}", ids)
        print_report(Verifier(TensorReader(options.checkpoint)).verify(outputs))
    if errors:
        raise RunError(
            f"{len(errors)} of {len(lines)} prompts failed; --output {options.output} has an error"
            f" record for each. The first: {next(iter(errors.values()))}"
        )
