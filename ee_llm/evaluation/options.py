"""The options of evaluations, and their checks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ee_llm.config import Config
from ee_llm.config.limits import MAX_RANKS, MAX_TIMEOUT_S, MIN_TIMEOUT_S
from ee_llm.errors import RequestError
from ee_llm.inference.choices import DtypeName


@dataclass(frozen=True)
class InputOptions:
    """Options of a model and a text that it runs over."""

    checkpoint: Path
    """Checkpoint directory, or run directory, whose newest checkpoint is used."""

    data: tuple[str, ...] = ()
    """Prefixes of prepared data, as 'ee-llm data prepare' writes."""

    text: tuple[Path, ...] = ()
    """Files or folders of plain text, JSON lines, JSON arrays or Parquet (key "text"), optionally
    compressed. The checkpoint's tokenizer encodes them."""

    num_tokens: int | None = None
    """Number of tokens to predict, from the start of the text. (default: all)"""

    seq_length: int | None = None
    """Length of a window in tokens. The model sees no token before the window. (default: the
    checkpoint's data.seq_length, at most 2048)"""


@dataclass(frozen=True)
class TextOptions(InputOptions):
    """Options of the commands that run a model over given text, on one or more ranks."""

    dtype: DtypeName = "auto"
    """Precision to compute in; auto is bfloat16 if the device supports it in hardware, else
    float32. Sums are float64."""

    tensor: int = 1
    """Number of tensor-parallel ranks of each pipeline stage."""

    pipeline: int = 1
    """Number of pipeline stages."""

    timeout_s: float = 600
    """Maximum number of seconds to wait for another rank."""

    progress: bool = True
    """Show a progress bar on standard error if it is a terminal."""


@dataclass(frozen=True)
class EvaluateOptions(TextOptions):
    """Measure the loss of every exit on given text."""


def check_options(options: TextOptions, *, needs_text: bool = True) -> None:
    """Raise RequestError for options that contradict each other or are out of range.

    needs_text: whether `data` or `text` must be given.
    """
    if needs_text:
        check_inputs(options)
    if options.dtype not in get_args(DtypeName):
        choices = ", ".join(get_args(DtypeName))
        raise RequestError(f"dtype = {options.dtype!r} is unknown. Use one of {choices}.")
    for name in ("tensor", "pipeline"):
        value = getattr(options, name)
        if type(value) is not int or not 1 <= value <= MAX_RANKS:
            raise RequestError(f"{name} = {value!r} is out of range. Use 1 to {MAX_RANKS}.")
    if not MIN_TIMEOUT_S <= options.timeout_s <= MAX_TIMEOUT_S:  # NaN fails too
        raise RequestError(
            f"timeout_s = {options.timeout_s} is out of range. Use {MIN_TIMEOUT_S} to"
            f" {MAX_TIMEOUT_S:,.0f} seconds."
        )


def check_inputs(options: InputOptions) -> None:
    """Raise RequestError if there is not exactly one text, or its length is out of range."""
    if not options.data and not options.text:
        raise RequestError(
            "there is no text to evaluate. Give data (--data) with the prefixes of prepared data,"
            " or text (--text) with text files."
        )
    if options.data and options.text:
        raise RequestError(
            f"data = {options.data[0]} and text = {options.text[0]} are both given. Use one of"
            " them."
        )
    if options.num_tokens is not None and options.num_tokens < 1:
        raise RequestError(f"num_tokens = {options.num_tokens} is out of range. Use 1 or more.")


def check_exits_exist(config: Config, checkpoint: Path, purpose: str) -> None:
    """Raise RequestError for a model without early exits; purpose: what they are wanted for."""
    if not config.exits.boundaries:
        raise RequestError(
            f"checkpoint = {checkpoint} has no early exits to {purpose}. Add some with 'ee-llm"
            " checkpoint add-exits', and tune them."
        )


def listed(values: object) -> list[Any]:
    """Return the values that a Python caller gave as one or several; None is none of them."""
    if values is None:
        return []
    if isinstance(values, str | bytes | Path) or not isinstance(values, Iterable):
        return [values]
    return list(values)


def shown_inputs(inputs: Sequence[str]) -> str:
    """Return the names of the texts for a title; of more than three, only the first."""
    if len(inputs) <= 3:
        return " ".join(inputs)
    return f"{inputs[0]} and {len(inputs) - 1} more"
