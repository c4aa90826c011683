"""The options of a calibration."""

from dataclasses import dataclass

from ee_llm.errors import RequestError
from ee_llm.evaluation.options import TextOptions
from ee_llm.inference.choices import MEASURES, Measure


@dataclass(frozen=True)
class CalibrateOptions(TextOptions):
    """Choose thresholds of the exits for a stated risk."""

    risk: float = 0.05
    """Greatest share of tokens whose exit disagrees with the final exit about the most probable
    token."""

    delta: float = 0.05
    """Greatest probability that the risk is exceeded, over the choice of the text."""

    measure: Measure = "max_probability"
    """Measure of confidence, as for 'ee-llm generate'."""

    seed: int = 0
    """Seed of the random split of the text: one half is searched, the other tested."""


def check_calibration(options: CalibrateOptions) -> None:
    """Raise RequestError for options that are out of range."""
    for name in ("risk", "delta"):
        value = getattr(options, name)
        if not isinstance(value, int | float) or not 0.0 < value < 1.0:  # NaN fails too
            raise RequestError(f"{name} = {value!r} is not between 0 and 1. Use 0.05, say.")
    if options.measure not in MEASURES:
        raise RequestError(
            f"measure = {options.measure!r} is unknown. Use one of {', '.join(MEASURES)}."
        )
