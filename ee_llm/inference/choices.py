"""The values that options of inference accept; this module imports no torch."""

from typing import Literal

from ee_llm.errors import RequestError

Attention = Literal["auto", "gather", "plain", "varlen", "flash"]
Bos = Literal["auto", "on", "off"]
DeferralMode = Literal["auto", "off"]
DtypeName = Literal["auto", "float32", "bfloat16", "float64"]
Measure = Literal["max_probability", "entropy", "margin"]
Quantize = Literal["none", "int8"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise RequestError unless an argument is one of the choices."""
    if value not in choices:
        raise RequestError(f"{name} = {value!r} is unknown. Use one of {', '.join(choices)}.")


def check_bool(name: str, value: object) -> None:
    """Raise RequestError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} = {value!r} must be True or False")
