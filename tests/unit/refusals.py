"""Return the errors of invalid configurations."""

import re
from pathlib import Path
from typing import Any

import pytest

from ee_llm.config import load_config
from ee_llm.errors import ConfigError


def message(overrides: dict[str, Any], path: Path | None = None) -> str:
    """Return the whole text of the error that `load_config` raises."""
    shape = {} if path else {"model.shape": "llama-tiny"}
    with pytest.raises(ConfigError) as caught:
        load_config(path, {**shape, **overrides})
    text = str(caught.value)
    # pydantic's own report is not for users.
    assert "validation error" not in text
    assert "pydantic" not in text
    return text


def assert_message(overrides: dict[str, Any], expected: str) -> None:
    """Assert that the error is one line that begins with `expected`, in which .* is any text."""
    pattern = re.escape(expected).replace(r"\.\*", ".*").replace(r"\ ", " ")
    error = message(overrides)
    assert re.match(pattern, error), error
    assert "\n" not in error
