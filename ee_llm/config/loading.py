"""Read a configuration from a TOML file and overrides."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ee_llm.config.config import Config, option_names
from ee_llm.config.errors import render
from ee_llm.config.shapes import SHAPE_FIELDS
from ee_llm.errors import ConfigError


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    below: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration in the TOML file `path`, with `overrides` taking precedence.

    `overrides` holds values by dotted name ("model.num_layers") or by section. A `model.shape`
    among them replaces the sizes in the file, so that naming another shape is enough. Without a
    path everything comes from the overrides and the defaults. `below` has, by section, what is
    said where neither says anything. Raises `ConfigError`.
    """
    source = "" if path is None else f"{path} with the options given" if overrides else str(path)
    try:
        return Config.model_validate(_merge(below or {}, read_options(path, overrides)))
    except ValidationError as error:
        raise ConfigError(render(error.errors(), option_names(), source)) from None


def read_options(
    path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """What the file and the overrides of `load_config` say, by section and unchecked."""
    given = _read(Path(path)) if path is not None else {}
    nested = _nest(overrides or {})
    chosen, in_file = nested.get("model"), given.get("model")
    if isinstance(chosen, dict) and chosen.get("shape") and isinstance(in_file, dict):
        given["model"] = {k: v for k, v in in_file.items() if k not in SHAPE_FIELDS}
    return _merge(given, nested)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; give a TOML file in it")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        # The nearest existing file is the likeliest mend.
        others = [str(other) for other in path.parent.glob("*.toml")]
        near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]}?" if near else "; give the path of a TOML file"
        raise ConfigError(f"{path}: no such configuration file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{path}: not TOML: {error}; strings need quotes, as in family = "llama"'
        ) from None


def _nest(overrides: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in overrides.items():
        section, _, leaf = name.partition(".")
        if leaf:
            value = {leaf: value}
        nested = _merge(nested, {section: value})
    return nested


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged
