"""Building blocks of the configuration's sections."""

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from ee_llm.config import toml


def list_to_tuple(value: Any) -> Any:
    """Return `value`, converted to a tuple if it is a list, as all arrays in TOML are."""
    return tuple(value) if isinstance(value, list) else value


Integers = Annotated[tuple[int, ...], BeforeValidator(list_to_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(list_to_tuple)]


def _paths_with_home(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(os.path.expanduser, paths))


# Expand ~ here: neither TOML nor a shell (in --output=~/runs) does.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
PathTexts = Annotated[
    tuple[str, ...], BeforeValidator(list_to_tuple), AfterValidator(_paths_with_home)
]


def option(
    default: Any,
    description: str,
    *,
    shown: str | None = None,
    words: tuple[str, ...] = (),
    **limits: Any,
) -> Any:
    """Return a documented field.

    Args:
        default: The default value.
        description: The meaning of the option and its unit, if any.
        shown: How help and docs print the default if it is not a plain value.
        words: Words that may be given instead of a value. `Config` replaces them by a value.
        limits: Pydantic's bounds (`gt`, `ge`, ...).
    """
    extra: JsonDict = {} if shown is None else {"shown_default": shown}
    if words:
        extra["words"] = list(words)
    return Field(
        default=default,
        description=description,
        validate_default=True,
        json_schema_extra=extra,
        **limits,
    )


def default_text(field: FieldInfo) -> str:
    """Return the default of a field in TOML notation, as help and docs print it."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "shown_default" in extra:
        return str(extra["shown_default"])
    return toml.notation(field.default)


def given_type(field: FieldInfo) -> Any:
    """Return the type of a field as a user may set it: that of its value, or one of its words."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(words := extra.get("words"), list):
        return field.annotation | Literal[tuple(words)]
    return field.annotation


class Section(BaseModel):
    """Base of all sections: immutable, without type conversions, rejecting unknown names."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


def fill(given: Any, defaults: Iterable[tuple[str, Any]]) -> Any:
    """Return `given` with missing, None and empty options filled in from `defaults`."""
    if not isinstance(given, dict):
        return given
    filled = dict(given)
    for name, value in defaults:
        if filled.get(name) in (None, (), []):
            filled[name] = value
    return filled
