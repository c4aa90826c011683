"""Convert the numbers of NumPy and other libraries to Python's own; this module imports no torch.

Values that users give are stored as Python's own numbers, since they are compared, hashed and
written as JSON.
"""

import numbers
import operator


def plain_int(value: object) -> int | None:
    """Return an integer as an `int`; None if the value is no integer, or a bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def plain_float(value: object) -> float | None:
    """Return a real number as a `float`; None if the value is no number, or a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
