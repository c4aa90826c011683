"""A model of Hugging Face's as one of ours: names, shapes and tensors, read one at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.checkpoint.safe import CheckpointError
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import Config, ConfigError
from ee_llm.convert.families import Family, SettingsError
from ee_llm.convert.folder import SETTINGS, Folder
from ee_llm.convert.settings import read_exits, read_settings
from ee_llm.convert.tables import Row, Table, copied_exits, rows_of
from ee_llm.data.tokenizer import load_tokenizer
from ee_llm.inference.weights import tensor_shapes

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Files that a tokenizer is made of, the first that is there."""


@dataclass(frozen=True)
class NewExits:
    """Exits to make of a model's own parts, see `copied_exits`."""

    boundaries: tuple[int, ...]
    head: tuple[str, ...] = ("norm",)
    output: str = "shared"


@dataclass(frozen=True)
class Source:
    """A model that is ready to be read: `specs` by our names, each made by `tensor`."""

    folder: Folder
    config: Config
    rows: dict[str, Row]
    specs: dict[str, TensorSpec]
    tokenizer_file: str
    notes: list[str] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        """Return one of our tensors, put together from those of the folder."""
        row = self.rows[name]
        return row.fusion.join(self.config.model, [self.folder.tensor(key) for key in row.theirs])


def open_source(
    path: str | Path,
    new_exits: NewExits | None = None,
    tokenizer: str | None = None,
    ignored: Sequence[str] = (),
) -> Source:
    """Return the model in a folder, after proving that it has exactly the tensors it should.

    `tokenizer` is as in `data.tokenizer`, if it is not the folder's own. `ignored` are settings of
    config.json to pass over. Raises CheckpointError naming the file, the key and what was expected.
    """
    folder = Folder(path)
    where = folder.path / SETTINGS
    try:
        family, model, notes = read_settings(folder.settings, ignored)
        exits, are_copies = _exits(folder, new_exits)
        sections: dict[str, Any] = {"model": model, "exits": exits, "training": _training(folder)}
        config = Config(**sections)
    except (SettingsError, ConfigError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    rows = rows_of(family.table, config)
    if are_copies:
        rows = copied_exits(rows, config)
    rows = _without_prefix(rows, family.table, folder)
    source = Source(folder, config, rows, {}, _tokenizer(folder, config, tokenizer), notes)
    _check_keys(source, family)
    for name, shape in tensor_shapes(config).items():
        source.specs[name] = _spec(source, rows[name], shape)
    return source


def own_tensors(config: Config) -> list[str]:
    """Return the names of the tensors that early exits have for themselves."""
    own = tuple(f"exits.{boundary}." for boundary in config.exits.boundaries)
    return [name for name in tensor_shapes(config) if own and name.startswith(own)]


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


def _training(folder: Folder) -> dict[str, str]:
    """Return the precision that the weights have, if one can train in it."""
    dtypes = {str(spec.dtype).removeprefix("torch.") for spec in folder.specs.values()}
    (name, *others) = dtypes
    return {} if others or name == "float16" else {"dtype": name}


def _without_prefix(rows: dict[str, Row], table: Table, folder: Folder) -> dict[str, Row]:
    prefix = table.optional_prefix
    if not prefix or table.words.removeprefix(prefix) not in folder.specs:
        return rows
    return {
        name: row._replace(theirs=tuple(key.removeprefix(prefix) for key in row.theirs))
        for name, row in rows.items()
    }


def _check_keys(source: Source, family: Family) -> None:
    """Raise CheckpointError unless every key is used, and every key that is used is there."""
    folder, table = source.folder, family.table
    kind, where = folder.settings["model_type"], folder.path / SETTINGS
    used = {key: row for row in source.rows.values() for key in row.theirs}
    missing = [key for key in used if key not in folder.specs]
    left = [
        key for key in folder.specs if key not in used and not key.endswith(table.buffers or "\0")
    ]
    if len(missing) > len(used) / 2:
        raise CheckpointError(
            f"{folder.path}: these are not the tensors of a {kind}, which {where} says it is: "
            f"{len(missing)} of {len(used)} keys are missing, the first is {missing[0]}, and "
            f"{len(left)} are of no use to it" + (f", the first is {left[0]}" if left else "")
        )
    is_tied = source.config.model.tie_embeddings
    if is_tied and table.output in left:
        left.remove(table.output)
        words = source.rows["embedding.word.weight"].theirs[0]
        if words not in missing:
            _check_tied(folder, words, table.output)
    if missing:
        key = missing[0]
        hint = ""
        if key == table.output:
            hint = f"; or is tie_word_embeddings = false in {where} wrong?"
        shape = list(_shape_of(source, used[key], key))
        raise CheckpointError(
            f"{_place(folder)}: {key} is missing: expected {shape} for {used[key].ours}"
            f"{_others(missing)}{hint}"
        )
    if left:
        raise CheckpointError(
            f"{folder.files[left[0]]}: {left[0]} {list(folder.specs[left[0]].shape)} is no tensor "
            f"of the {kind} that {where} describes{_others(left)}"
        )


def _check_tied(folder: Folder, words: str, output: str) -> None:
    if not torch.equal(folder.tensor(words), folder.tensor(output)):
        raise CheckpointError(
            f"{folder.files[output]}: {output} is not {words}, but tie_word_embeddings in "
            f"{folder.path / SETTINGS} is true (or left out, which is the same here); set it to "
            "false if the output has a weight of its own"
        )


def _spec(source: Source, row: Row, shape: tuple[int, ...]) -> TensorSpec:
    folder = source.folder
    expected = row.shapes(source.config.model, shape)
    assert len(expected) == len(row.theirs), f"{row.ours} is made of {len(row.theirs)}"
    for key, wanted in zip(row.theirs, expected, strict=True):
        if folder.specs[key].shape != wanted:
            raise CheckpointError(
                f"{folder.files[key]}: {key} has shape {list(folder.specs[key].shape)}, expected "
                f"{list(wanted)} from {folder.path / SETTINGS}"
            )
    dtypes = {key: folder.specs[key].dtype for key in row.theirs}
    if len(set(dtypes.values())) > 1:
        raise CheckpointError(
            f"{folder.files[row.theirs[0]]}: {row.ours} is made of tensors of several types: "
            + ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())
        )
    return TensorSpec(shape, dtypes[row.theirs[0]])


def _shape_of(source: Source, row: Row, key: str) -> tuple[int, ...]:
    shape = tensor_shapes(source.config)[row.ours]
    return row.shapes(source.config.model, shape)[row.theirs.index(key)]


def _place(folder: Folder) -> Path:
    files = set(folder.files.values())
    return files.pop() if len(files) == 1 else folder.path


def _others(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if keys[1:] else ""


def _tokenizer(folder: Folder, config: Config, given: str | None) -> str:
    """Return the tokenizer as `data.tokenizer` names one, after proving that the model fits it."""
    found = [str(folder.path / name) for name in TOKENIZERS if (folder.path / name).is_file()]
    if given is None and not found:
        raise CheckpointError(
            f"{folder.path / TOKENIZERS[0]} is missing: expected the model's tokenizer; give "
            "another place with --tokenizer, or 'bytes'"
        )
    name = given or found[0]
    vocabulary = load_tokenizer(name).vocab_size
    if vocabulary > config.model.vocab_size:
        raise CheckpointError(
            f"{name} has {vocabulary} tokens, but vocab_size = {config.model.vocab_size} in "
            f"{folder.path / SETTINGS}; expected the tokenizer that the model was trained with"
        )
    return name
