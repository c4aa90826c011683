"""Write TOML, which the standard library can only read."""

import json
from collections.abc import Mapping
from typing import Any


def notation(value: Any) -> str:
    """Return `value` in TOML notation."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # A JSON string is a TOML string, except that TOML requires DEL to be escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(notation(item) for item in value) + "]"
    raise TypeError(f"TOML cannot represent {type(value).__name__}")


def dump(table: Mapping[str, Any]) -> str:
    """Return `table` as TOML: its values, then one section per mapping; None values are omitted."""
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
