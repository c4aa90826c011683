"""Run a checkpoint over given text, in this process or on ranks that this process starts."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed
from rich.progress import TextColumn
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.gates import gated_boundaries
from ee_llm.architecture.tensors import take_tensors
from ee_llm.checkpoint.gates import TensorsWithGates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.data.prepare import check_tokenizer
from ee_llm.data.text_windows import TextWindows
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.data.windows import (
    CountedWindows,
    LaterWindows,
    TargetWindow,
    Windows,
    default_length,
)
from ee_llm.errors import RequestError, UserError
from ee_llm.evaluation.measure import Collector, measure
from ee_llm.evaluation.options import InputOptions, TextOptions, check_options
from ee_llm.inference.choices import Measure
from ee_llm.inference.execution.stage import check_layout
from ee_llm.inference.execution.teacher_forced import TeacherForced
from ee_llm.inference.exits.policy import check_gates, make_exit_policy
from ee_llm.launch.local import run_ranks


@dataclass(frozen=True)
class TextPass:
    """A finished pass over a text.

    Attributes:
        reader: The checkpoint.
        inputs: Prefixes of prepared data, or text files.
        num_tokens: Number of predicted tokens.
        seq_length: Length of a window in tokens.
        dtype: Name of the dtype of the computation.
        digest: Digest of the token ids, 16 hexadecimal digits.
        found: The result of the collector.
    """

    reader: TensorReader
    inputs: tuple[str, ...]
    num_tokens: int
    seq_length: int
    dtype: str
    digest: str
    found: list[dict[str, Any]]


def run_pass(
    options: TextOptions,
    title: str,
    make_collector: Callable[[Config], Collector],
    confidence: Measure = "max_probability",
    skipped: int = 0,
    gates: Mapping[str, Tensor] | None = None,
    make_windows: Callable[[TensorReader, Tokenizer, int], CountedWindows] | None = None,
) -> TextPass | None:
    """Run the model over the text, on every rank that a launcher has started.

    Returns None without running anything if tensor x pipeline > 1 and there is no launcher: the
    caller then starts that many ranks with `run_command`.

    Args:
        options: The options.
        title: Label of the progress bar.
        make_collector: Returns what takes the measurements; raises UserError for a model that it
            cannot use.
        confidence: The measure of confidence.
        skipped: Number of tokens at the start of the text that are not used.
        gates: Gates to use instead of the checkpoint's, by name.
        make_windows: Returns the windows, from the checkpoint, its tokenizer and their greatest
            length, instead of those of the options' text.

    Raises:
        UserError: The options, the text or the checkpoint is not valid.
        RunError: The loss of an exit is not finite, or a rank was lost.
    """
    check_options(options, needs_text=make_windows is None)
    _check_world(options)
    reader = TensorReader(options.checkpoint)
    config = reader.config()
    seq_length = window_length(options, config)
    check_layout(config, options.tensor, options.pipeline)
    tokenizer = load_tokenizer(reader.tokenizer(), config.data.eos_token)
    if make_windows is None:
        text = open_windows(options, tokenizer, seq_length, options.num_tokens)
        windows: CountedWindows = LaterWindows(text, skipped)
    else:
        windows = make_windows(reader, tokenizer, seq_length)
    collector = make_collector(config)
    num_ranks = options.tensor * options.pipeline
    if num_ranks > 1 and distributed.launched_world_size() is None:
        distributed.check_gpus(options.tensor, options.pipeline)
        return None
    dtype, digest = distributed.dtype_named(options.dtype), hashlib.sha256()
    with _connected(options, num_ranks) as ranks:
        stored = TensorsWithGates(reader, {} if gates is None and confidence != "gate" else gates)
        if confidence == "gate":
            exits = config.exits.boundaries
            check_gates(make_exit_policy(exits, [1.0], "gate"), gated_boundaries(stored))
        tensors = take_tensors(config, stored, dtype, distributed.device())
        model = TeacherForced(config, tensors, seq_length, ranks)
        share = TextColumn("{task.percentage:.0f} %")
        is_quiet = not options.progress or not distributed.is_rank_zero()
        with distributed.progress_bar(title, windows.num_tokens, share, is_quiet=is_quiet) as bar:
            (task,) = bar.task_ids
            num_tokens, found = measure(
                model,
                config,
                _digested(windows, digest),
                collector,
                tokenizer.eos_token_id if config.data.mask_after_eos else None,
                ranks,
                lambda amount: bar.update(task, advance=amount, total=windows.num_tokens),
                confidence,
            )
    inputs = options.data or tuple(map(str, options.text))
    name = str(dtype).removeprefix("torch.")
    return TextPass(reader, inputs, num_tokens, seq_length, name, digest.hexdigest()[:16], found)


def run_command(command: str, options: TextOptions) -> Any:
    """Run a command in ranks on this machine and return what the first one writes with --json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        arguments = [f"{options.checkpoint}", f"--json={path}"]
        for field in fields(options):
            value, name = getattr(options, field.name), field.name.replace("_", "-")
            if isinstance(value, bool):
                arguments.append(f"--{name}" if value else f"--no-{name}")
            elif field.name != "checkpoint" and value is not None:
                values = value if isinstance(value, tuple) else (value,)
                arguments += [f"--{name}={one}" for one in values]
        outcome = run_ranks(options.tensor * options.pipeline, [command, *arguments])
        if outcome is not None:
            raise outcome.error()
        return json.loads(path.read_text(encoding="utf-8"))


def window_length(options: InputOptions, config: Config) -> int:
    """Return the length of a window in tokens; raises RequestError if it is out of range."""
    longest = config.model.max_seq_length
    if options.seq_length is None:
        return default_length(config)
    if not 1 <= options.seq_length <= longest:
        raise RequestError(
            f"seq_length = {options.seq_length} is out of range. Use 1 to {longest}"
            " (model.max_seq_length)."
        )
    return options.seq_length


def open_windows(
    options: InputOptions, tokenizer: Tokenizer, seq_length: int, num_tokens: int | None
) -> Windows | TextWindows:
    """Return the windows of the text.

    Args:
        options: The options that name the text.
        tokenizer: The checkpoint's tokenizer.
        seq_length: Greatest number of predicted tokens in a window.
        num_tokens: Greatest number of tokens to predict; None for all.

    Raises:
        DataError: The text cannot be read, or another tokenizer has prepared it.
    """
    if options.text:
        return TextWindows(options.text, tokenizer, seq_length, num_tokens)
    for prefix in options.data:
        check_tokenizer(prefix, tokenizer)
    return Windows(options.data, seq_length, num_tokens)


def _digested(windows: CountedWindows, digest: Any) -> Iterator[Tensor | TargetWindow]:
    """Yield windows and update a digest with their token ids."""
    for one in windows:
        tokens = one.tokens if isinstance(one, TargetWindow) else one
        digest.update(tokens.numpy().tobytes())
        yield one


@contextmanager
def _connected(options: TextOptions, num_ranks: int) -> Iterator[distributed.InferenceGrid | None]:
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


def _check_world(options: TextOptions) -> None:
    """Raise UserError if a launcher has started another number of ranks than the options name."""
    num_ranks, started = options.tensor * options.pipeline, distributed.launched_world_size()
    if started is not None and started != num_ranks:
        raise UserError(
            f"tensor = {options.tensor} x pipeline = {options.pipeline} does not fit WORLD_SIZE ="
            f" {started} in the environment. Start {num_ranks} ranks, or unset it."
        )
