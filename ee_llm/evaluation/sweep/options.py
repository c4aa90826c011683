"""The options of a sweep, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ee_llm.config.limits import MAX_RANKS, MAX_TIMEOUT_S, MIN_TIMEOUT_S
from ee_llm.errors import RequestError
from ee_llm.inference.choices import Attention, DtypeName, Measure

ExitStrategy = Literal["exact", "propagate"]
Family = Literal["thresholds", "self-speculative"]

DEFAULT_PROMPTS = 16
"""Number of prompts that are taken from a text."""

DEFAULT_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Thresholds for measures that are probabilities, or differences of them."""

_WITHOUT_SCALE: tuple[Measure, ...] = ("entropy", "saturation")
"""Measures whose scale depends on the model, so that no thresholds suit all models."""

_MIN_VALUES = {"prompt_length": 1, "max_tokens": 2, "batch_size": 1, "rounds": 1}
_MAX_VALUE = 2**20


@dataclass(frozen=True)
class SweepOptions:
    """Measure the speed and the quality of exit policies and drafts by generating text."""

    checkpoint: Path
    """Checkpoint directory, or run directory, whose newest checkpoint is used."""

    prompts: Path | None = None
    """File with one JSON object per line, with "prompt", "messages" or "prompt_token_ids"."""

    data: tuple[str, ...] = ()
    """Prefixes of prepared data. Prompts are taken from it at even distances."""

    text: tuple[Path, ...] = ()
    """Files or folders of plain text, JSON lines, JSON arrays or Parquet (key "text"). Prompts are
    taken from the start of the text."""

    num_prompts: int | None = None
    """Number of prompts. (default: all of --prompts; 16 of --data or --text)"""

    prompt_length: int = 64
    """Tokens of a prompt from --data or --text, without a beginning-of-sequence token, which is
    added if the tokenizer's settings ask for it."""

    chat_template: Path | None = None
    """Use the chat template (Jinja) in this file instead of the model's own."""

    max_tokens: int = 64
    """Generate at most this many tokens for each prompt."""

    ignore_eos: bool = False
    """Do not stop at the model's end tokens."""

    families: tuple[Family, ...] = ("thresholds", "self-speculative")
    """What to measure: thresholds of the exits, drafts for self-speculative decoding, or both."""

    exits: tuple[str, ...] = ()
    """Exits to use together, as 8, 8+16 or all; each value is a set of its own. (default: each exit
    alone, and all of them)"""

    thresholds: tuple[float, ...] = ()
    """Thresholds to measure for each set of exits, in (0, 1]. (default: 0.5 0.7 0.8 0.9 0.95, but
    none for the measures entropy and saturation, whose scale depends on the model)"""

    strategy: ExitStrategy = "exact"
    """Strategy for thresholds, as for 'ee-llm generate'."""

    measure: Measure = "max_probability"
    """Measure of confidence for thresholds, as for 'ee-llm generate'."""

    policy: tuple[Path, ...] = ()
    """Policy files to measure as well, such as those of 'ee-llm calibrate'."""

    draft_exits: tuple[int, ...] = ()
    """Exits that draft. (default: each exit)"""

    draft_lengths: tuple[int, ...] = (2, 4, 8)
    """Numbers of tokens to draft before all layers check them."""

    min_agreement: float = 0.99
    """Recommend the fastest point that agrees with the full model on at least this share of
    tokens."""

    batch_size: int = 1
    """Number of prompts that are decoded together."""

    rounds: int = 4
    """Number of rounds. In each, every point decodes its share of the prompts, and the full model
    takes turns with them. With fewer than 4, no point is recommended."""

    dtype: DtypeName = "auto"
    """Precision to compute in; auto is bfloat16 if the device supports it in hardware, else
    float32."""

    attention: Attention = "auto"
    """Attention kernel, as for 'ee-llm generate'."""

    cuda_graphs: bool = False
    """Replay passes of few rows as CUDA graphs."""

    compile: bool = False
    """Compile the layers with torch.compile."""

    tensor: int = 1
    """Number of tensor-parallel ranks of each pipeline stage."""

    pipeline: int = 1
    """Number of pipeline stages."""

    timeout_s: float = 600
    """Maximum number of seconds to wait for another rank."""

    progress: bool = True
    """Show a progress bar on standard error if it is a terminal."""

    @property
    def thresholds_used(self) -> tuple[float, ...]:
        """The thresholds, or the default ones."""
        return self.thresholds or DEFAULT_THRESHOLDS


def check_sweep(options: SweepOptions) -> None:
    """Raise RequestError for options that contradict each other or are out of range."""
    for name, least in _MIN_VALUES.items():
        _check_integer(name, getattr(options, name), least, _MAX_VALUE)
    for name in ("tensor", "pipeline"):
        _check_integer(name, getattr(options, name), 1, MAX_RANKS)
    if options.num_prompts is not None:
        _check_integer("num_prompts", options.num_prompts, 1, _MAX_VALUE)
    for length in options.draft_lengths:
        _check_integer("draft_lengths", length, 1, _MAX_VALUE)
    for threshold in options.thresholds:
        _check_share("thresholds", threshold)
    _check_share("min_agreement", options.min_agreement)
    choices = {
        "dtype": DtypeName,
        "strategy": ExitStrategy,
        "measure": Measure,
        "attention": Attention,
    }
    for name, kind in choices.items():
        if getattr(options, name) not in get_args(kind):
            raise RequestError(
                f"{name} = {getattr(options, name)!r} is unknown. Use one of"
                f" {', '.join(get_args(kind))}."
            )
    for family in options.families:
        if family not in get_args(Family):
            raise RequestError(
                f"families: {family!r} is unknown. Use one of {', '.join(get_args(Family))}."
            )
    uses_thresholds = "thresholds" in options.families and not options.thresholds
    if uses_thresholds and options.measure in _WITHOUT_SCALE:
        raise RequestError(
            f"measure = {options.measure!r} has no default thresholds, because its scale depends on"
            " the model. Give some (--thresholds), such as those that 'ee-llm calibrate --measure"
            f" {options.measure}' finds, or leave thresholds out of families (--families)."
        )
    if not MIN_TIMEOUT_S <= options.timeout_s <= MAX_TIMEOUT_S:  # NaN fails too
        raise RequestError(
            f"timeout_s = {options.timeout_s} is out of range. Use {MIN_TIMEOUT_S} to"
            f" {MAX_TIMEOUT_S:,.0f} seconds."
        )


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} = {value!r} is out of range. Use {least} to {most:,}.")


def _check_share(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0.0 < value <= 1.0:  # NaN fails too
        raise RequestError(f"{name} = {value!r} is not in (0, 1]. Use 0.9, say.")
