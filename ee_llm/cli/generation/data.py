"""`ee-llm data generate`: sample prepared data from a model."""

import json
from collections.abc import Iterator
from typing import Any

from ee_llm import distributed
from ee_llm.cli.generation.execution import check_execution, load_model
from ee_llm.cli.generation.options import DataGenerateOptions, GenerateOptions
from ee_llm.cli.generation.prompts import MAX_BATCH, Prompt
from ee_llm.errors import RequestError, UserError
from ee_llm.inference.corpus.generate import check_absent, generate_corpus
from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.json_lines import decode, opened, parse_object, read_lines, short
from ee_llm.inference.text.prompt_content import KINDS, prompt_content
from ee_llm.inference.text.prompt_encoder import EncodedPrompt

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")


def check(options: DataGenerateOptions) -> None:
    """Raise UserError for invalid options, before any process is started."""
    if options.num_tokens is not None and options.num_tokens < 1:
        raise UserError(f"--num-tokens {options.num_tokens} is out of range. Use 1 or more.")
    if options.prompts is None and options.num_tokens is None:
        raise UserError("--num-tokens is missing. Give it, or --prompts, or both.")
    if options.num_tokens is not None and (options.temperature == 0.0 or options.top_k == 1):
        given = "--temperature 0" if options.temperature == 0.0 else "--top-k 1"
        raise UserError(
            f"{given} always gives the same text, so --num-tokens would repeat the same documents."
            " Use a higher value, or --prompts without --num-tokens."
        )
    _sampling_params(options)
    check_absent(options.output, jsonl=options.jsonl)
    check_execution(options)


def generate_data(options: DataGenerateOptions) -> None:
    """Write the data, and print a summary.

    Raises:
        UserError: An option or a prompt is not valid, or the output exists.
        RunError: The model computed logits that are not finite, or a rank failed.
    """
    check(options)
    # Only rank 0 reads prompts, so that errors are reported once.
    prompts = list(_read_prompts(options)) if distributed.is_rank_zero() else []
    with load_model(options, deferral="off") as llm:
        if not llm.is_leader:
            llm.worker_loop()
            return
        encoded = [_encode(llm, prompt) for prompt in prompts]
        report = generate_corpus(
            llm,
            options.output,
            encoded or [llm.encoder.encode_start(bos=options.bos)],
            _sampling_params(options),
            num_tokens=options.num_tokens,
            max_num_seqs=options.max_num_seqs,
            jsonl=options.jsonl,
            progress=options.progress,
        )
    print(json.dumps(report.to_dict()) if options.json else report)


def _sampling_params(options: DataGenerateOptions) -> SamplingParams:
    return SamplingParams(**{name: getattr(options, name) for name in _SAMPLING})


def _read_prompts(options: DataGenerateOptions) -> Iterator[Prompt]:
    """Yield the prompt on each line of --prompts that is not blank; without the option, none."""
    path = options.prompts
    if path is None:
        return
    source = f"--prompts {path}"
    encoding = GenerateOptions(
        options.checkpoint, bos=options.bos, parse_special=options.parse_special
    )
    is_empty = True
    is_json = path.suffix in (".jsonl", ".ndjson")
    with opened(path, source) as file:
        for number, line in enumerate(read_lines(file, source, MAX_BATCH), start=1):
            where = f"{source}, line {number}"
            if line.strip():
                if is_empty and str(path) == "-":  # The first line decides for all.
                    is_json = _is_record(line)
                content = _from_json(line, where) if is_json else _from_text(line, where)
                yield Prompt(encoding, where=where, **content)
                is_empty = False
    if is_empty:
        raise UserError(f"{source} is empty. Give one prompt per line.")


def _is_record(line: bytes) -> bool:
    """Return whether a line is a JSON object with a prompt."""
    try:
        return not parse_object(line, "").keys().isdisjoint(KINDS)
    except RequestError:
        return False


def _from_json(line: bytes, where: str) -> dict[str, Any]:
    record = parse_object(line, where)
    if unknown := sorted(record.keys() - {*KINDS, "id"}):
        raise UserError(f"{where}: {short(unknown[0])} is unknown. Give one of {', '.join(KINDS)}.")
    return prompt_content(record, where)


def _from_text(line: bytes, where: str) -> dict[str, Any]:
    return {"text": decode(line, where).rstrip("\r\n")}


def _encode(llm: LLM, prompt: Prompt) -> EncodedPrompt:
    """Return the tokens of a prompt; raises UserError if it does not fit the model."""
    try:
        encoded = prompt.encode(llm.encoder)
        request = llm.make_request(encoded, SamplingParams(max_tokens=1), strategy="full")
        llm.engine.add(request)  # also checks that the cache is large enough
        llm.engine.abort(request.id)
    except ValueError as error:
        raise UserError(f"{prompt.where}: {error}") from error
    return encoded
