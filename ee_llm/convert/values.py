"""Values of settings and arguments from elsewhere, each checked before anything is made of it."""

import sys
from collections.abc import Mapping
from typing import Any

from ee_llm.errors import ConversionError

Settings = Mapping[str, Any]

LARGEST = 2**28  # far beyond any model; a tensor of two such sizes has less than 2**63 bytes


class SettingsError(ConversionError):
    """A setting or an argument that is missing, or that no option of ours can say."""


def need(settings: Settings, *names: str) -> list[int]:
    """Return the counts of these names; raises SettingsError."""
    found = []
    for name in names:
        value = settings.get(name)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise SettingsError(f"{name} is {value!r}: expected a count of at most {LARGEST}")
        found.append(value)
    return found


def refuse(settings: Settings, **allowed: Any) -> None:
    """Raise SettingsError for settings that are neither absent nor as `allowed` says."""
    for name, only in allowed.items():
        if (value := settings.get(name)) is not None and value != only:
            raise SettingsError(f"{name} = {value!r} can not be converted; only {only!r} can")


def to_number(name: str, value: Any) -> float:
    """Return a setting's value as a number; raises SettingsError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"{name} is {value!r}: expected a number")
    if not abs(value) <= sys.float_info.max:
        raise SettingsError(f"{name} is {value!r}: expected a finite number")
    return float(value)


def flag(settings: Settings, name: str, default: bool = False) -> bool:
    """Return a setting that is true or false; raises SettingsError."""
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}: expected true or false")
    return default if value is None else value


def count(settings: Settings, name: str, default: int) -> int:
    """Return a count, the default where it is left out or null; raises SettingsError."""
    return default if settings.get(name) is None else need(settings, name)[0]


def check_layers(name: str, num_layers: int, num_tensors: int) -> None:
    """Raise SettingsError for more layers than there are tensors, before anything is made of them.

    name: of the setting that states their number.
    """
    if num_layers > num_tensors:
        raise SettingsError(
            f"{name} = {num_layers}, but there are {num_tensors} tensors, and each layer has "
            "several; is it another model's?"
        )
