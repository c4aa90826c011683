"""A model from elsewhere as one of ours: names, shapes and tensors, read one at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_llm.checkpoint.tokenizer import COMPANIONS, ORIGIN
from ee_llm.config import Config
from ee_llm.config.tokenizer import BYTES
from ee_llm.convert.huggingface.folder import SETTINGS, Folder
from ee_llm.convert.huggingface.settings import read_exits, read_settings
from ee_llm.convert.huggingface.tables import GPT2, Row, Table, copied_exits, rows_of
from ee_llm.convert.megatron.checkpoint import is_megatron, open_megatron
from ee_llm.convert.source import Origin, Source, fitting_tokenizer, prove, training_options
from ee_llm.convert.values import SettingsError, check_layers
from ee_llm.errors import CheckpointError, ConfigError

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files that a tokenizer is made of, the first that is there."""

_MOST_SHOWN = 60  # characters of a setting's value

_OF_TOKENIZERS = frozenset(COMPANIONS) - {SETTINGS, "generation_config.json"}


@dataclass(frozen=True)
class NewExits:
    """Exits to make of a model's own parts, see `copied_exits`."""

    boundaries: tuple[int, ...]
    head: tuple[str, ...] = ("norm",)
    output: str = "shared"


def open_source(
    path: str | Path,
    new_exits: NewExits | None = None,
    tokenizer: str | None = None,
    is_strict: bool = False,
) -> Source:
    """Return the model in a directory, after proving that it has exactly the tensors it should.

    The directory is Hugging Face's or Megatron-LM's. `tokenizer` is as in `data.tokenizer`, if it
    is not the folder's own. `is_strict` refuses settings of config.json whose meaning is unknown,
    which otherwise are noted. Raises CheckpointError naming the file, the key and what was
    expected.
    """
    if is_megatron(Path(path)):
        return open_megatron(Path(path), vars(new_exits) if new_exits else None, tokenizer)
    folder = Folder(path)
    where = folder.path / SETTINGS
    try:
        family, model, notes, unknown = read_settings(folder.settings)
        if unknown and is_strict:
            raise SettingsError(
                f"unknown settings {_listed(unknown)}, which --strict refuses; leave it out, and "
                "compare the logits with transformers' by --check"
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
    names = _kept(folder, tokenizer)
    files = {f"{ORIGIN}/{name}": (folder.path / name).read_bytes() for name in names}
    source = prove(Source(folder, origin, config, rows, {}, name, notes, files), family.table)
    if unknown:
        notes.append(
            f"{where} has settings of unknown meaning: {_listed(unknown)}. Every tensor is "
            "accounted for, so they probably change nothing; --check compares the logits with "
            "transformers', --strict refuses such settings"
        )
    return source


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_shortened(value)}" for name, value in settings.items())


def _shortened(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= _MOST_SHOWN else shown[:_MOST_SHOWN] + "..."


def _exits(folder: Folder, new: NewExits | None) -> tuple[dict[str, Any], bool]:
    """Return the options of `exits`, and whether they are made of the model's own parts."""
    found = read_exits(folder.settings)
    if new is None:
        return found or ({}, False)
    if found is not None:
        raise SettingsError(
            f"the model has exits at {found.options['boundaries']} already; leave out --exits"
        )
    return vars(new), True


def _without_prefix(rows: dict[str, Row], table: Table, folder: Folder) -> dict[str, Row]:
    prefix = table.optional_prefix
    if not prefix or table.words.removeprefix(prefix) not in folder.specs:
        return rows
    return {
        name: row._replace(theirs=tuple(key.removeprefix(prefix) for key in row.theirs))
        for name, row in rows.items()
    }


def _kept(folder: Folder, given: str | None) -> list[str]:
    """Return the names of the files that come along: those of its tokenizer, if that is kept."""
    there = [name for name in COMPANIONS if (folder.path / name).is_file()]
    own = [str(folder.path / name) for name in TOKENIZERS if name in there]
    is_kept = given is None or (given != BYTES and not own)
    if given is not None and given != BYTES and own:
        content = Path(given).read_bytes()
        is_kept = any(Path(name).read_bytes() == content for name in own)
    return [name for name in there if is_kept or name not in _OF_TOKENIZERS]


def _tokenizer(
    folder: Folder, config: Config, origin: Origin, given: str | None, notes: list[str]
) -> str:
    """Return the tokenizer as `data.tokenizer` names one, after proving that the model fits it."""
    found = [str(folder.path / name) for name in TOKENIZERS if (folder.path / name).is_file()]
    if given is None and not found:
        raise CheckpointError(
            f"{folder.path / TOKENIZERS[0]} is missing: expected the model's tokenizer; give "
            "another place with --tokenizer, or 'bytes'"
        )
    return fitting_tokenizer(given or found[0], config, origin, notes)
