"""Evaluate a checkpoint, in this process or on ranks that this process starts."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed
from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.architecture.tensors import take_tensors
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.config import Config
from ee_llm.data.prepare import check_tokenizer
from ee_llm.data.text_windows import TextWindows
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.data.windows import Windows, default_length
from ee_llm.errors import RequestError, UserError
from ee_llm.evaluation.measure import measure
from ee_llm.evaluation.options import EvaluateOptions, check_options
from ee_llm.evaluation.result import EvaluationResult
from ee_llm.inference.execution.stage import check_layout
from ee_llm.inference.execution.teacher_forced import TeacherForced
from ee_llm.launch.local import run_ranks


def evaluate(options: EvaluateOptions) -> EvaluationResult:
    """Return the metrics of every exit, on every rank that a launcher has started.

    With tensor x pipeline > 1 and without a launcher, this starts that many ranks on this machine.

    Args:
        options: The options.

    Raises:
        UserError: The options, the text or the checkpoint is not valid.
        RunError: The loss of an exit is not finite, or a rank failed or was lost.
    """
    check_options(options)
    _check_world(options)
    reader = TensorReader(options.checkpoint)
    config = reader.config()
    seq_length = _seq_length(options, config)
    check_layout(config, options.tensor, options.pipeline)
    tokenizer = load_tokenizer(reader.tokenizer(), config.data.eos_token)
    windows = _windows(options, tokenizer, seq_length)
    num_ranks = options.tensor * options.pipeline
    if num_ranks > 1 and distributed.launched_world_size() is None:
        distributed.check_gpus(options.tensor, options.pipeline)
        return _launch(options, num_ranks)
    dtype = distributed.dtype_named(options.dtype)
    with _connected(options, num_ranks) as ranks:
        tensors = take_tensors(config, CheckpointTensors(reader), dtype, distributed.device())
        model = TeacherForced(config, tensors, seq_length, ranks)
        share = TextColumn("{task.percentage:.0f} %")
        is_quiet = not options.progress or not distributed.is_rank_zero()
        with distributed.progress_bar(
            "evaluating", windows.num_tokens, share, is_quiet=is_quiet
        ) as bar:
            (task,) = bar.task_ids
            num_tokens, exits = measure(
                model,
                config,
                windows,
                tokenizer.eos_token_id if config.data.mask_after_eos else None,
                ranks,
                lambda amount: bar.update(task, advance=amount, total=windows.num_tokens),
            )
    return EvaluationResult(
        str(reader.path),
        options.data or tuple(map(str, options.text)),
        num_tokens,
        seq_length,
        str(dtype).removeprefix("torch."),
        exits,
    )


def _seq_length(options: EvaluateOptions, config: Config) -> int:
    longest = config.model.max_seq_length
    if options.seq_length is None:
        return default_length(config)
    if not 1 <= options.seq_length <= longest:
        raise RequestError(
            f"seq_length = {options.seq_length} is out of range. Use 1 to {longest}"
            " (model.max_seq_length)."
        )
    return options.seq_length


def _windows(
    options: EvaluateOptions, tokenizer: Tokenizer, seq_length: int
) -> Windows | TextWindows:
    if options.text:
        return TextWindows(options.text, tokenizer, seq_length, options.num_tokens)
    for prefix in options.data:
        check_tokenizer(prefix, tokenizer)
    return Windows(options.data, seq_length, options.num_tokens)


@contextmanager
def _connected(
    options: EvaluateOptions, num_ranks: int
) -> Iterator[distributed.InferenceGrid | None]:
    """Yield the ranks that a launcher has started, None for a single process."""
    if num_ranks == 1:
        yield None
        return
    if torch.distributed.is_initialized():
        raise RequestError(
            f"tensor = {options.tensor} x pipeline = {options.pipeline}: this process already uses"
            " torch.distributed. Close the LLM, or use a new process."
        )
    ranks = distributed.connect_serving(
        tensor=options.tensor, pipeline=options.pipeline, timeout_s=options.timeout_s
    )
    yield ranks
    ranks.shutdown()  # Not after an error: the ranks that wait for this one report their own.


def _launch(options: EvaluateOptions, num_ranks: int) -> EvaluationResult:
    """Run `ee-llm evaluate` in ranks on this machine; the first one writes the result to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        arguments = [
            f"--dtype={options.dtype}",
            f"--tensor={options.tensor}",
            f"--pipeline={options.pipeline}",
            f"--timeout-s={options.timeout_s}",
            f"--json={path}",
            *(f"--data={prefix}" for prefix in options.data),
            *(f"--text={file}" for file in options.text),
        ]
        for name in ("num_tokens", "seq_length"):
            if (value := getattr(options, name)) is not None:
                arguments.append(f"--{name.replace('_', '-')}={value}")
        if not options.progress:
            arguments.append("--no-progress")
        outcome = run_ranks(num_ranks, ["evaluate", f"{options.checkpoint}", *arguments])
        if outcome is not None:
            raise outcome.error()
        return EvaluationResult.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _check_world(options: EvaluateOptions) -> None:
    """Raise UserError if a launcher has started another number of ranks than the options name."""
    num_ranks, started = options.tensor * options.pipeline, distributed.launched_world_size()
    if started is not None and started != num_ranks:
        raise UserError(
            f"tensor = {options.tensor} x pipeline = {options.pipeline} does not fit WORLD_SIZE ="
            f" {started} in the environment. Start {num_ranks} ranks, or unset it."
        )
