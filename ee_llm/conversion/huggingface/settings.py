"""Converts between config.json of transformers and the options of a model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ee_llm.checkpoint.read import FUNCTION_OF_EXITS
from ee_llm.config import Config
from ee_llm.conversion.huggingface.families import FAMILIES, ROPE_KEYS, Family, rope_type
from ee_llm.conversion.huggingface.keys import (
    NEUTRAL,
    OTHER_MODELS,
    ROPE_NEUTRAL,
    ROPE_TYPES,
    is_neutral,
    unknown_keys,
)
from ee_llm.conversion.values import Settings, SettingsError

ENTRY = "ee_llm"
"""The entry of config.json that describes exits. transformers keeps it without reading it."""


class ModelSettings(NamedTuple):
    """The model that config.json describes."""

    family: Family
    options: dict[str, Any]
    """The options of `model`."""
    notes: list[str]
    """Notes on changes and assumptions of the conversion."""
    unknown: dict[str, Any]
    """Settings of unknown meaning."""


def read_settings(settings: Settings) -> ModelSettings:
    """Read the settings of a model.

    Raises SettingsError if a setting is missing or malformed, or if the model computes another
    function than ee-llm's; the error then names all settings that make it do so.
    """
    kind = settings.get("model_type")
    supported = f"Supported: {', '.join(FAMILIES)}."
    if isinstance(kind, str) and kind in OTHER_MODELS:
        raise SettingsError(
            f"model_type = {kind!r} is not supported, because it computes another function: it has "
            f"{OTHER_MODELS[kind]}. {supported}"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SettingsError(f"model_type = {kind!r} is not supported. {supported}")
    family = FAMILIES[kind]
    if found := _other_functions(settings, NEUTRAL | family.neutral):
        raise SettingsError(
            f"the model computes another function than ee-llm's {kind}: {'; '.join(found)}. "
            "Convert a model without these settings, or remove them from config.json if the model "
            "was not trained with them."
        )
    options, notes = family.read(settings)
    return ModelSettings(family, options, notes, unknown_keys(settings))


def _other_functions(settings: Settings, neutral: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Return the settings that make the model compute another function."""
    found = [
        f"{name} = {settings[name]!r}"
        for name, values in neutral.items()
        if name in settings and not is_neutral(settings[name], values)
    ]
    for table in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := settings.get(table), dict):
            found += _other_rotations(table, rope)
    if (quantization := settings.get("quantization_config")) not in (None, {}):
        found += _quantization(quantization)
    return found


def _other_rotations(table: str, rope: Settings) -> list[str]:
    kind = rope_type(rope)
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        name = f" ({ROPE_TYPES[kind]})" if isinstance(kind, str) and kind in ROPE_TYPES else ""
        return [f"{table} of type {kind!r}{name}"]
    return [
        f"{table}.{name} = {value!r}"
        for name, value in rope.items()
        if isinstance(value, dict) or not is_neutral(value, ROPE_NEUTRAL.get(name, (value,)))
    ]


def _quantization(config: Any) -> list[str]:
    if not isinstance(config, dict):
        return [f"quantization_config = {config!r}"]
    switches = [config[name] for name in ("load_in_4bit", "load_in_8bit") if name in config]
    method = config.get("quant_method", "bitsandbytes" if switches else None)
    if method == "bitsandbytes" and switches and not any(switches):
        return []  # switched off
    return [f"weights quantized with {method!r} (quantization_config)"]


class Exits(NamedTuple):
    """The exits of a folder.

    options: the options of `exits`.
    are_copies: whether they have no tensors, as copies of the final norm and output weight.
    """

    options: dict[str, Any]
    are_copies: bool


def read_exits(settings: Settings) -> Exits | None:
    """Return the exits with which the model was exported, or None; raises SettingsError."""
    entry = settings.get(ENTRY)
    if entry is None:
        return None
    options = entry.get("exits") if isinstance(entry, dict) else None
    if not isinstance(options, dict) or set(options) != set(FUNCTION_OF_EXITS):
        raise SettingsError(
            f"{ENTRY}.exits: expected {', '.join(FUNCTION_OF_EXITS)}, found {options!r}"
        )
    if not isinstance(are_copies := entry.get("copies"), bool):
        raise SettingsError(f"{ENTRY}.copies is {are_copies!r}: expected true or false")
    return Exits(options, are_copies)


def write_settings(
    config: Config, dtype: torch.dtype, preferred: str | None = None
) -> tuple[Family, dict[str, Any]]:
    """Return the family and the config.json of a model.

    `preferred` is the model type to try first. Raises SettingsError if transformers has no equal
    model.
    """
    model = config.model
    kinds: Sequence[str] = [preferred, *FAMILIES] if preferred in FAMILIES else [*FAMILIES]
    kind = next((kind for kind in kinds if FAMILIES[kind].fits(model)), None)
    if kind is None:
        raise SettingsError(
            f"none of the model types {', '.join(FAMILIES)} is a {model.family} with "
            f"model.position = {model.position}, model.qkv_bias = "
            f"{str(model.qkv_bias).lower()}, model.qk_norm = {str(model.qk_norm).lower()}, "
            f"{model.num_heads} heads of size {model.head_dim} and "
            f"{model.num_kv_heads} key/value heads in a hidden size of {model.hidden_size}"
        )
    family = FAMILIES[kind]
    settings = {
        "architectures": [family.architecture],
        "model_type": kind,
        **family.write(model),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    return family, settings


def exits_entry(config: Config, are_copies: bool) -> dict[str, Any]:
    """Return the entry of config.json that describes exits, for `read_exits`."""
    exits = config.exits.model_dump()
    return {"exits": {name: exits[name] for name in FUNCTION_OF_EXITS}, "copies": are_copies}
