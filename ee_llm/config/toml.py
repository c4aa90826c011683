"""Writing TOML; the standard library only reads it."""

import json
from collections.abc import Mapping
from typing import Any


def notation(value: Any) -> str:
    """`value` in TOML's notation."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML string, but for DEL, which TOML wants escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(notation(item) for item in value) + "]"
    raise TypeError(f"no TOML for {type(value).__name__}")


def dump(table: Mapping[str, Any]) -> str:
    """`table` as TOML: its values, then a section for each mapping in it; None is left out."""
    values = [
        f"{key} = {notation(value)}"
        for key, value in table.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    sections = [
        f"[{key}]\n{dump(value)}" for key, value in table.items() if isinstance(value, Mapping)
    ]
    top = ["\n".join(values) + "\n"] if values else []
    return "\n".join(top + sections)
