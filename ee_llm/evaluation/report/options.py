"""The options of a report."""

from dataclasses import dataclass
from pathlib import Path

from ee_llm.errors import RequestError
from ee_llm.inference.choices import DtypeName

_MAX_SAMPLES = 100
_MAX_TOKENS = 2**16


@dataclass(frozen=True)
class ReportOptions:
    """Describe a model's exits on one HTML page."""

    checkpoint: Path
    """Checkpoint directory, or run directory, whose newest checkpoint is used."""

    data: tuple[str, ...] = ()
    """Prefixes of prepared data, as 'ee-llm data prepare' writes. Use text that did not train the
    exits."""

    text: tuple[Path, ...] = ()
    """Files or folders of plain text, JSON lines, JSON arrays or Parquet (key "text")."""

    sweep: Path | None = None
    """Result of 'ee-llm sweep --json' for the same model."""

    calibration: Path | None = None
    """Policy file of 'ee-llm calibrate --output' for the same model."""

    num_tokens: int | None = None
    """Number of tokens to predict, from the start of the text. (default: all)"""

    seq_length: int | None = None
    """Length of a window in tokens. (default: the checkpoint's data.seq_length, at most 2048)"""

    num_samples: int = 3
    """Number of generations to show, after prompts from the text."""

    max_tokens: int = 64
    """Greatest number of generated tokens in each of them."""

    dtype: DtypeName = "auto"
    """Precision to compute in; auto is bfloat16 if the device supports it in hardware, else
    float32."""

    progress: bool = True
    """Show progress bars on standard error if it is a terminal."""


def check_report(options: ReportOptions) -> None:
    """Raise RequestError for options that are out of range; `evaluate` checks the others."""
    limits = {"num_samples": (0, _MAX_SAMPLES), "max_tokens": (1, _MAX_TOKENS)}
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if type(value) is not int or not least <= value <= most:
            raise RequestError(f"{name} = {value!r} is out of range. Use {least} to {most:,}.")
