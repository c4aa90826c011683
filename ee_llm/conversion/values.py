"""Checked access to settings and arguments of other software."""

import sys
from collections.abc import Mapping
from typing import Any

from ee_llm.errors import ConversionError

Settings = Mapping[str, Any]

LARGEST = 2**28  # beyond any model; a tensor of two such sizes has less than 2**63 bytes


class SettingsError(ConversionError):
    """A setting or an argument is missing, malformed or cannot be converted."""


def read_counts(settings: Settings, *names: str) -> list[int]:
    """Return the counts with these names; raises SettingsError if one is missing or invalid."""
    counts = []
    for name in names:
        value = settings.get(name)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise SettingsError(f"{name} is {value!r}: expected a count of at most {LARGEST}")
        counts.append(value)
    return counts


def check_values(settings: Settings, **allowed: Any) -> None:
    """Raise SettingsError for settings that are present and differ from the `allowed` value."""
    for name, only in allowed.items():
        if (value := settings.get(name)) is not None and value != only:
            raise SettingsError(f"{name} = {value!r} cannot be converted; only {only!r} can")


def to_number(name: str, value: Any) -> float:
    """Return a setting's value as a number; raises SettingsError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"{name} is {value!r}: expected a number")
    if not abs(value) <= sys.float_info.max:
        raise SettingsError(f"{name} is {value!r}: expected a finite number")
    return float(value)


def flag(settings: Settings, name: str, default: bool = False) -> bool:
    """Return a Boolean setting, or the default if it is missing or null; raises SettingsError."""
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}: expected true or false")
    return default if value is None else value


def count(settings: Settings, name: str, default: int) -> int:
    """Return a count, or the default if it is missing or null; raises SettingsError."""
    return default if settings.get(name) is None else read_counts(settings, name)[0]


def check_layers(name: str, num_layers: int, num_tensors: int) -> None:
    """Raise SettingsError for more layers than tensors, before anything is allocated.

    `name` is the setting that states the number of layers.
    """
    if num_layers > num_tensors:
        raise SettingsError(
            f"{name} = {num_layers}, but there are only {num_tensors} tensors, and each layer has "
            "several. Check that the settings belong to this model."
        )
