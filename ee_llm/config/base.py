"""What all sections of the configuration are made of."""

import os
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from ee_llm.config import toml


def list_to_tuple(value: Any) -> Any:
    """`value`, as a tuple where it is a list, which is all that TOML has."""
    return tuple(value) if isinstance(value, list) else value


Integers = Annotated[tuple[int, ...], BeforeValidator(list_to_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(list_to_tuple)]


def _paths_with_home(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(os.path.expanduser, paths))


# Paths may begin with ~, which neither TOML nor a shell (in --output=~/runs) replaces.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
PathTexts = Annotated[
    tuple[str, ...], BeforeValidator(list_to_tuple), AfterValidator(_paths_with_home)
]


def option(default: Any, description: str, *, shown: str | None = None, **limits: Any) -> Any:
    """A documented field.

    `description` gives the meaning and, where there is one, the unit; `shown` is how help and docs
    print the default when it is not a plain value; `limits` are pydantic's (`gt`, `ge`, ...).
    """
    extra: JsonDict = {} if shown is None else {"shown_default": shown}
    return Field(
        default=default,
        description=description,
        validate_default=True,
        json_schema_extra=extra,
        **limits,
    )


def default_text(field: FieldInfo) -> str:
    """The default of a field as help and docs print it, in TOML's notation."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "shown_default" in extra:
        return str(extra["shown_default"])
    return toml.notation(field.default)


class Section(BaseModel):
    """Base of all sections: immutable, no conversions between types, no unknown names."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


def fill(given: Any, defaults: Iterable[tuple[str, Any]]) -> Any:
    """`given` with the options it lacks, None and empty ones included, taken from `defaults`."""
    if not isinstance(given, dict):
        return given
    filled = dict(given)
    for name, value in defaults:
        if filled.get(name) in (None, (), []):
            filled[name] = value
    return filled
