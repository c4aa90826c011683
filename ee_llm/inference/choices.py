"""The values that options of inference accept; this module imports no torch."""

from typing import Literal, get_args

from ee_llm.errors import RequestError

Attention = Literal["auto", "gather", "plain", "varlen", "flash"]
Bos = Literal["auto", "on", "off"]
DeferralMode = Literal["auto", "off"]
DtypeName = Literal["auto", "float32", "bfloat16", "float64"]
LogitMeasure = Literal["max_probability", "entropy", "margin"]
HiddenMeasure = Literal["saturation", "gate"]
Measure = Literal[
    "max_probability", "entropy", "margin", "agreement", "shortlist", "saturation", "gate"
]
Quantize = Literal["none", "int8"]

LOGIT_MEASURES: tuple[LogitMeasure, ...] = get_args(LogitMeasure)
"""Measures of confidence that an exit computes from its logits alone."""

HIDDEN_MEASURES: tuple[HiddenMeasure, ...] = get_args(HiddenMeasure)
"""Measures of confidence that an exit computes from hidden states, before its output projection."""

NUM_CANDIDATES = 16
"""Number of tokens that the measure "shortlist" compares."""

NUM_PREDICTED: dict[Measure, int] = {"agreement": 1, "shortlist": NUM_CANDIDATES}
"""Number of token ids at most that a measure passes on from an exit to the next one."""

MEASURES: tuple[Measure, ...] = get_args(Measure)
"""All measures of confidence."""


def logit_measure(measure: Measure) -> LogitMeasure:
    """Return the measure that an exit uses if it takes every token, as the final exit does.

    It is `measure` itself if that is computed from logits, else "max_probability".
    """
    return next((one for one in LOGIT_MEASURES if one == measure), "max_probability")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise RequestError unless an argument is one of the choices."""
    if value not in choices:
        raise RequestError(f"{name} = {value!r} is unknown. Use one of {', '.join(choices)}.")


def check_bool(name: str, value: object) -> None:
    """Raise RequestError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} = {value!r} must be True or False")
