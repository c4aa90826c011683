"""A model from elsewhere that is ready to be read, and the proof that it is what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import Config
from ee_llm.convert.huggingface.folder import DTYPES
from ee_llm.convert.huggingface.tables import Row, Table
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import CheckpointError

_MOST_NAMED = 8  # tensors in a remark


class Tensors(Protocol):
    """Tensors by key, each read when asked for: what is known of them, and where they are."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """What is known of each tensor."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Where each tensor is, for people."""

    def tensor(self, key: str) -> Tensor:
        """Return a tensor."""


class Origin(NamedTuple):
    """How to speak of a model: its kind, where its settings are, and what they call things."""

    kind: str
    settings: str
    vocabulary: str
    tie: tuple[str, str, str]
    """The setting of tied weights, its value for tied, and that for untied."""


@dataclass(frozen=True)
class Source:
    """A model that is ready to be read: `specs` by our names, each made by `tensor`."""

    folder: Tensors
    origin: Origin
    config: Config
    rows: dict[str, Row]
    specs: dict[str, TensorSpec]
    tokenizer_file: str
    notes: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """What else to keep, by name."""
    non_finite: dict[str, str] = field(default_factory=dict)
    """Of the tensors read so far: how many weights are infinite or NaN, by key."""

    def tensor(self, name: str) -> Tensor:
        """Return one of our tensors, put together from those of the folder."""
        row = self.rows[name]
        return row.fusion.join(self.config.model, [self._read(key) for key in row.theirs])

    def damage(self) -> list[str]:
        """Return a remark on the weights read so far that are not finite, if there are any."""
        if not self.non_finite:
            return []
        shown = [f"{key} ({counts})" for key, counts in [*self.non_finite.items()][:_MOST_NAMED]]
        more = len(self.non_finite) - len(shown)
        return [
            f"{len(self.non_finite)} tensors have weights that are infinite or NaN: "
            f"{', '.join(shown)}{f' and {more} more' if more else ''}. The model's outputs will "
            "not be finite either; check the files, or convert another copy of the model"
        ]

    def _read(self, key: str) -> Tensor:
        tensor = self.folder.tensor(key)
        # The extremes need no memory, and are NaN where any weight is.
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            count = tensor.numel() - int(tensor.isfinite().sum())
            self.non_finite[key] = f"{count} of {tensor.numel()}"
        return tensor


def prove(source: Source, table: Table) -> Source:
    """Return the source with its specs, after proving that it has exactly the tensors it should.

    Raises CheckpointError naming the file, the key and what was expected.
    """
    _check_keys(source, table)
    for name, shape in tensor_shapes(source.config).items():
        source.specs[name] = _spec(source, source.rows[name], shape)
    return source


def training_options(tensors: Tensors, table: Table) -> dict[str, str]:
    """Return the precision of the weights, buffers left out, if one can train in it."""
    dtypes = {
        str(spec.dtype).removeprefix("torch.")
        for key, spec in tensors.specs.items()
        if not table.is_buffer(key)
    }
    if len(dtypes) != 1 or dtypes == {"float16"}:
        return {}
    return {"dtype": dtypes.pop()}


def fitting_tokenizer(name: str, config: Config, origin: Origin, notes: list[str]) -> str:
    """Return the tokenizer's name, after proving that the model fits it; add what to know to notes.

    Raises CheckpointError if the tokenizer has more tokens than the model.
    """
    tokenizer = load_tokenizer(name)
    vocabulary = tokenizer.vocab_size
    if vocabulary > config.model.vocab_size:
        raise CheckpointError(
            f"{name} has {vocabulary} tokens, but {origin.vocabulary} = {config.model.vocab_size} "
            f"in {origin.settings}; expected the tokenizer that the model was trained with"
        )
    if unused := tokenizer.tokens_without_embedding:
        notes.append(
            f"{name} adds tokens that the embedding has no row for ({origin.vocabulary} = "
            f"{config.model.vocab_size}); they are left out: {', '.join(unused[:_MOST_NAMED])}"
            f"{_others(unused[_MOST_NAMED - 1 :])}"
        )
    return name


def _check_keys(source: Source, table: Table) -> None:
    """Raise CheckpointError unless every key is used, and every key that is used is there."""
    folder, kind, where = source.folder, source.origin.kind, source.origin.settings
    used = {key: row for row in source.rows.values() for key in row.theirs}
    missing = [key for key in used if key not in folder.specs]
    left = [key for key in folder.specs if key not in used and not table.is_buffer(key)]
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
            _check_tied(source, words, table.output)
    if missing:
        key = missing[0]
        hint = ""
        if key == table.output:
            setting, _, untied = source.origin.tie
            hint = f"; or is {setting} = {untied} in {where} wrong?"
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


def _check_tied(source: Source, words: str, output: str) -> None:
    folder, (setting, tied, untied) = source.folder, source.origin.tie
    if not torch.equal(folder.tensor(words), folder.tensor(output)):
        raise CheckpointError(
            f"{folder.files[output]}: {output} is not {words}, but {setting} in "
            f"{source.origin.settings} is {tied} (or left out, which is the same here); set it to "
            f"{untied} if the output has a weight of its own"
        )


def _spec(source: Source, row: Row, shape: tuple[int, ...]) -> TensorSpec:
    folder = source.folder
    expected = row.shapes(source.config.model, shape)
    assert len(expected) == len(row.theirs), f"{row.ours} is made of {len(row.theirs)}"
    for key, wanted in zip(row.theirs, expected, strict=True):
        if folder.specs[key].shape != wanted:
            raise CheckpointError(
                f"{folder.files[key]}: {key} has shape {list(folder.specs[key].shape)}, expected "
                f"{list(wanted)} from {source.origin.settings}"
            )
    dtypes = {key: folder.specs[key].dtype for key in row.theirs}
    for key, dtype in dtypes.items():
        if dtype not in DTYPES.values():
            raise CheckpointError(
                f"{folder.files[key]}: {key} is of type {str(dtype).removeprefix('torch.')}; "
                "expected float64, float32, float16 or bfloat16, not a quantised model"
            )
    if len(set(dtypes.values())) > 1:
        raise CheckpointError(
            f"{folder.files[row.theirs[0]]}: {row.ours} is made of tensors of several types: "
            + ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())
        )
    return TensorSpec(shape, dtypes[row.theirs[0]])


def _shape_of(source: Source, row: Row, key: str) -> tuple[int, ...]:
    shape = tensor_shapes(source.config)[row.ours]
    return row.shapes(source.config.model, shape)[row.theirs.index(key)]


def _place(folder: Tensors) -> Path:
    files = set(folder.files.values())
    return files.pop() if len(files) == 1 else folder.path


def _others(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more)" if keys[1:] else ""
