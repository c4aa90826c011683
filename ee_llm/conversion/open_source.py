"""Opens a model of Hugging Face or Megatron-LM for conversion."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_llm.checkpoint.tokenizer import COMPANIONS, ORIGIN
from ee_llm.config import Config
from ee_llm.config.tokenizer import BYTES
from ee_llm.conversion.huggingface.folder import SETTINGS, Folder
from ee_llm.conversion.huggingface.settings import read_exits, read_settings
from ee_llm.conversion.huggingface.tables import GPT2, Row, Table, copied_exits, rows_of
from ee_llm.conversion.megatron.checkpoint import is_megatron, open_megatron
from ee_llm.conversion.source import (
    Origin,
    Source,
    check_tensors,
    check_tokenizer,
    training_options,
)
from ee_llm.conversion.values import SettingsError, check_layers
from ee_llm.errors import CheckpointError, ConfigError

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Possible files of a tokenizer, in order of preference."""

_MAX_SHOWN = 60  # characters of a setting's value

_TOKENIZER_FILES = frozenset(COMPANIONS) - {SETTINGS, "generation_config.json"}


@dataclass(frozen=True)
class NewExits:
    """Exits to add as copies of the model's own parts, see `copied_exits`."""

    boundaries: tuple[int, ...]
    head: tuple[str, ...] = ("norm",)
    output: str = "shared"


def open_source(
    path: str | Path,
    new_exits: NewExits | None = None,
    tokenizer: str | None = None,
    is_strict: bool = False,
) -> Source:
    """Open the model in a directory and check that it has exactly the expected tensors.

    Args:
        path: A directory of Hugging Face or Megatron-LM.
        new_exits: Exits to add.
        tokenizer: A value of `data.tokenizer`, if it is not the folder's own.
        is_strict: Reject settings of config.json whose meaning is unknown, instead of noting them.

    Raises:
        CheckpointError: A file or a tensor is missing or not as expected; names the file, the key
            and what was expected.
    """
    if is_megatron(Path(path)):
        return open_megatron(Path(path), vars(new_exits) if new_exits else None, tokenizer)
    folder = Folder(path)
    where = folder.path / SETTINGS
    try:
        family, model, notes, unknown = read_settings(folder.settings)
        if unknown and is_strict:
            raise SettingsError(
                f"unknown settings {_listed(unknown)}, which --strict rejects. Use --check instead "
                "to compare the logits with those of transformers."
            )
        layers = "n_layer" if family.table is GPT2 else "num_hidden_layers"
        check_layers(layers, model["num_layers"], len(folder.specs))
        exits, are_copies = _exits(folder, new_exits)
        training = training_options(folder, family.table)
        sections: dict[str, Any] = {"model": model, "exits": exits, "training": training}
        config = Config(**sections)
    except (SettingsError, ConfigError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    rows = rows_of(family.table, config)
    if are_copies:
        rows = copied_exits(rows, config)
    rows = _without_prefix(rows, family.table, folder)
    tie = ("tie_word_embeddings", "true", "false")
    origin = Origin(folder.settings["model_type"], str(where), "vocab_size", tie)
    name = _tokenizer(folder, config, origin, tokenizer, notes)
    companions = _companions(folder, tokenizer)
    files = {f"{ORIGIN}/{name}": (folder.path / name).read_bytes() for name in companions}
    source = check_tensors(
        Source(folder, origin, config, rows, {}, name, notes, files), family.table
    )
    if unknown:
        notes.append(
            f"{where} has settings of unknown meaning: {_listed(unknown)}. All tensors are known, "
            "so these settings probably have no effect. --check compares the logits with those of "
            "transformers; --strict rejects such settings."
        )
    return source


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_shortened(value)}" for name, value in settings.items())


def _shortened(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."


def _exits(folder: Folder, new: NewExits | None) -> tuple[dict[str, Any], bool]:
    """Return the options of `exits`, and whether the exits are copies of the model's parts."""
    found = read_exits(folder.settings)
    if new is None:
        return found or ({}, False)
    if found is not None:
        raise SettingsError(
            f"the model already has exits at {found.options['boundaries']}. Remove --exits."
        )
    return vars(new), True


def _without_prefix(rows: dict[str, Row], table: Table, folder: Folder) -> dict[str, Row]:
    prefix = table.optional_prefix
    if not prefix or table.words.removeprefix(prefix) not in folder.specs:
        return rows
    return {
        name: row._replace(keys=tuple(key.removeprefix(prefix) for key in row.keys))
        for name, row in rows.items()
    }


def _companions(folder: Folder, given: str | None) -> list[str]:
    """Return the names of the files to keep, without those of a tokenizer that is replaced."""
    existing = [name for name in COMPANIONS if (folder.path / name).is_file()]
    own = [str(folder.path / name) for name in TOKENIZERS if name in existing]
    is_own = given is None or (given != BYTES and not own)
    if given is not None and given != BYTES and own:
        content = Path(given).read_bytes()
        is_own = any(Path(name).read_bytes() == content for name in own)
    return [name for name in existing if is_own or name not in _TOKENIZER_FILES]


def _tokenizer(
    folder: Folder, config: Config, origin: Origin, given: str | None, notes: list[str]
) -> str:
    """Return the tokenizer as a value of `data.tokenizer`, after checking that it fits."""
    found = [str(folder.path / name) for name in TOKENIZERS if (folder.path / name).is_file()]
    if given is None and not found:
        raise CheckpointError(
            f"{folder.path / TOKENIZERS[0]} is missing: expected the model's tokenizer. Pass "
            "another path, or 'bytes', with --tokenizer."
        )
    return check_tokenizer(given or found[0], config, origin, notes)
