"""A model of other software, opened for conversion, and checks of its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import Config
from ee_llm.conversion.huggingface.folder import DTYPES
from ee_llm.conversion.huggingface.tables import Row, Table
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.errors import CheckpointError

_MAX_NAMED = 8  # tensors in a note


class Tensors(Protocol):
    """Tensors by key, read on access, with their specs and files."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The shape and dtype of each tensor."""

    @property
    def files(self) -> Mapping[str, Path]:
        """The file of each tensor, for error messages."""

    def tensor(self, key: str) -> Tensor:
        """Return a tensor."""


class Origin(NamedTuple):
    """Terms for error messages about a model: its kind, its settings and their names."""

    kind: str
    settings: str
    vocabulary: str
    tie: tuple[str, str, str]
    """The setting of tied weights, and its values for tied and untied weights."""


@dataclass(frozen=True)
class Source:
    """A model opened for conversion: `tensor` returns the tensors that `specs` names."""

    folder: Tensors
    origin: Origin
    config: Config
    rows: dict[str, Row]
    specs: dict[str, TensorSpec]
    tokenizer_file: str
    notes: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """The contents of further files to keep, by name."""
    non_finite: dict[str, str] = field(default_factory=dict)
    """The number of infinite and NaN weights in the tensors read so far, by key."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint, assembled from those of the source."""
        row = self.rows[name]
        return row.fusion.join(self.config.model, [self._read(key) for key in row.keys])

    def non_finite_notes(self) -> list[str]:
        """Return a note on weights read so far that are not finite, if there are any."""
        if not self.non_finite:
            return []
        shown = [f"{key} ({counts})" for key, counts in [*self.non_finite.items()][:_MAX_NAMED]]
        more = len(self.non_finite) - len(shown)
        return [
            f"{len(self.non_finite)} tensors have weights that are infinite or NaN: "
            f"{', '.join(shown)}{f' and {more} more' if more else ''}. The model's outputs will "
            "not be finite either. Check the files, or convert another copy of the model."
        ]

    def _read(self, key: str) -> Tensor:
        tensor = self.folder.tensor(key)
        # The extremes need no memory, and are NaN if any weight is.
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            count = tensor.numel() - int(tensor.isfinite().sum())
            self.non_finite[key] = f"{count} of {tensor.numel()}"
        return tensor


def check_tensors(source: Source, table: Table) -> Source:
    """Check that a source has exactly the expected tensors, and return it with its specs.

    Raises CheckpointError naming the file, the key and what was expected.
    """
    _check_keys(source, table)
    for name, shape in tensor_shapes(source.config).items():
        source.specs[name] = _spec(source, source.rows[name], shape)
    return source


def training_options(tensors: Tensors, table: Table) -> dict[str, str]:
    """Return `training.dtype` if all weights have one dtype that supports training."""
    dtypes = {
        str(spec.dtype).removeprefix("torch.")
        for key, spec in tensors.specs.items()
        if not table.is_buffer(key)
    }
    if len(dtypes) != 1 or dtypes == {"float16"}:
        return {}
    return {"dtype": dtypes.pop()}


def check_tokenizer(name: str, config: Config, origin: Origin, notes: list[str]) -> str:
    """Check that a tokenizer fits the model, and return its name.

    Adds notes about tokens without an embedding. Raises CheckpointError if the tokenizer has more
    tokens than the model.
    """
    tokenizer = load_tokenizer(name)
    vocabulary = tokenizer.vocab_size
    if vocabulary > config.model.vocab_size:
        raise CheckpointError(
            f"{name} has {vocabulary} tokens, but {origin.vocabulary} = {config.model.vocab_size} "
            f"in {origin.settings}. Use the tokenizer with which the model was trained."
        )
    if unused := tokenizer.tokens_without_embedding:
        notes.append(
            f"{name} adds tokens for which the embedding has no row ({origin.vocabulary} = "
            f"{config.model.vocab_size}). They are omitted: {', '.join(unused[:_MAX_NAMED])}"
            f"{_others(unused[_MAX_NAMED - 1 :])}"
        )
    return name


def _check_keys(source: Source, table: Table) -> None:
    """Raise CheckpointError unless the keys are exactly those that the model needs."""
    folder, kind, where = source.folder, source.origin.kind, source.origin.settings
    used = {key: row for row in source.rows.values() for key in row.keys}
    missing = [key for key in used if key not in folder.specs]
    extra = [key for key in folder.specs if key not in used and not table.is_buffer(key)]
    if len(missing) > len(used) / 2:
        raise CheckpointError(
            f"{folder.path}: the tensors are not those of a {kind}, which {where} describes: "
            f"{len(missing)} of {len(used)} keys are missing, the first is {missing[0]}, and "
            f"{len(extra)} are unknown" + (f", the first is {extra[0]}" if extra else "")
        )
    is_tied = source.config.model.tie_embeddings
    if is_tied and table.output in extra:
        extra.remove(table.output)
        words = source.rows["embedding.word.weight"].keys[0]
        if words not in missing:
            _check_tied(source, words, table.output)
    if missing:
        key = missing[0]
        hint = ""
        if key == table.output:
            setting, _, untied = source.origin.tie
            hint = f". Check {setting} = {untied} in {where}."
        shape = list(_shape_of(source, used[key], key))
        raise CheckpointError(
            f"{_place(folder)}: {key} is missing: expected {shape} for {used[key].name}"
            f"{_others(missing)}{hint}"
        )
    if extra:
        key = extra[0]
        raise CheckpointError(
            f"{folder.files[key]}: {key} {list(folder.specs[key].shape)} is not a tensor of the "
            f"{kind} that {where} describes{_others(extra)}"
        )


def _check_tied(source: Source, words: str, output: str) -> None:
    folder, (setting, tied, untied) = source.folder, source.origin.tie
    if not torch.equal(folder.tensor(words), folder.tensor(output)):
        raise CheckpointError(
            f"{folder.files[output]}: {output} differs from {words}, but {setting} in "
            f"{source.origin.settings} is {tied}, or missing, which means the same. Set it to "
            f"{untied} if the output has its own weight."
        )


def _spec(source: Source, row: Row, shape: tuple[int, ...]) -> TensorSpec:
    folder = source.folder
    expected = row.shapes(source.config.model, shape)
    assert len(expected) == len(row.keys), f"{row.name} combines {len(row.keys)} tensors"
    for key, expected_shape in zip(row.keys, expected, strict=True):
        if folder.specs[key].shape != expected_shape:
            raise CheckpointError(
                f"{folder.files[key]}: {key} has shape {list(folder.specs[key].shape)}, expected "
                f"{list(expected_shape)} from {source.origin.settings}"
            )
    dtypes = {key: folder.specs[key].dtype for key in row.keys}
    for key, dtype in dtypes.items():
        if dtype not in DTYPES.values():
            raise CheckpointError(
                f"{folder.files[key]}: {key} has dtype {str(dtype).removeprefix('torch.')}. "
                "Expected float64, float32, float16 or bfloat16, not a quantized model."
            )
    if len(set(dtypes.values())) > 1:
        raise CheckpointError(
            f"{folder.files[row.keys[0]]}: {row.name} combines tensors of several dtypes: "
            + ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())
        )
    return TensorSpec(shape, dtypes[row.keys[0]])


def _shape_of(source: Source, row: Row, key: str) -> tuple[int, ...]:
    shape = tensor_shapes(source.config)[row.name]
    return row.shapes(source.config.model, shape)[row.keys.index(key)]


def _place(folder: Tensors) -> Path:
    files = set(folder.files.values())
    return files.pop() if len(files) == 1 else folder.path


def _others(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more)" if keys[1:] else ""
