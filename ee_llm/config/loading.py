"""Load a configuration from a TOML file and overrides."""

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
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration from the TOML file `path`, with `overrides` taking precedence.

    Args:
        path: The TOML file. Without one, all values come from the overrides and the defaults.
        overrides: Values by dotted name ("model.num_layers") or by section. A `model.shape` among
            them replaces all sizes of the model in the file.
        defaults: Values by section, used where neither the file nor the overrides set an option.

    Raises:
        ConfigError: The file cannot be read or the configuration is not valid.
    """
    source = "" if path is None else f"{path} with the options given" if overrides else str(path)
    try:
        return Config.model_validate(_merge(defaults or {}, read_options(path, overrides)))
    except ValidationError as error:
        raise ConfigError(render(error.errors(), option_names(), source)) from None


def read_options(
    path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Return the options that the file and the overrides of `load_config` set, without checks."""
    given = _read(Path(path)) if path is not None else {}
    nested = _nest(overrides or {})
    override, in_file = nested.get("model"), given.get("model")
    if isinstance(override, dict) and override.get("shape") and isinstance(in_file, dict):
        given["model"] = {k: v for k, v in in_file.items() if k not in SHAPE_FIELDS}
    return _merge(given, nested)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a directory. Give a TOML file in it.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        # Suggest the file with the most similar name.
        others = [str(other) for other in path.parent.glob("*.toml")]
        near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.8)
        hint = f"Did you mean {near[0]}?" if near else "Give the path of a TOML file."
        raise ConfigError(f"{path}: no such configuration file. {hint}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{path} is not valid TOML: {error}. Strings need quotes, as in family = "llama".'
        ) from None


def _nest(overrides: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in overrides.items():
        section, _, leaf = name.partition(".")
        if leaf:
            value = {leaf: value}
        nested = _merge(nested, {section: value})
    return nested


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged
