"""Exports a checkpoint to a folder for transformers: in full, without exits, or cut at an exit."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.tensors import take_tensors, tensor_shapes
from ee_llm.atomic_file import sync_path
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.checkpoint.tokenizer import ORIGIN, companions
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.config import Config
from ee_llm.config.tokenizer import BYTES
from ee_llm.conversion.huggingface.folder import SETTINGS, read_object
from ee_llm.conversion.huggingface.settings import ENTRY, exits_entry, read_settings, write_settings
from ee_llm.conversion.huggingface.shards import write_shards
from ee_llm.conversion.huggingface.tables import Row, own_tensors, rows_of
from ee_llm.conversion.values import SettingsError
from ee_llm.errors import CheckpointError, ConversionError

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Submodel:
    """A model with a part of the tensors of another one.

    config: its configuration.
    origins: the original name of each of its tensors.
    """

    config: Config
    origins: Mapping[str, str]


def full_model(config: Config) -> Submodel:
    """Return the unchanged model."""
    return Submodel(config, {name: name for name in tensor_shapes(config)})


def dense_model(config: Config) -> Submodel:
    """Return the model without its early exits."""
    return full_model(_without_exits(config))


def truncated_model(config: Config, boundary: int) -> Submodel:
    """Return the ordinary model that ends with the exit at `boundary`.

    Raises ConversionError with the reason if there is no such model.
    """
    exits = config.exits
    if boundary not in exits.boundaries:
        raise ConversionError(
            f"--truncate-at {boundary}: the model has no exit there, only at "
            f"{list(exits.boundaries)}"
        )
    reason = ""
    if "norm" not in exits.head:
        reason = "an ordinary model has a norm before its output weight, and the exit has none"
    elif exits.head != ("norm",):
        reason = "an ordinary model has only a norm between its layers and its output weight"
    elif (temperature := exits.temperatures[exits.boundaries.index(boundary)]) != 1:
        reason = f"an ordinary model has no temperature, and the exit's is {temperature}"
    if reason:
        raise ConversionError(
            f"--truncate-at {boundary} with exits.head = {list(exits.head)} is impossible: {reason}"
        )
    weight = output_weight_name(config, boundary)
    is_tied = weight == "embedding.word.weight"
    truncated = _without_exits(config, num_layers=boundary, tie_embeddings=is_tied, shape=None)
    # The exit's norm already has the name of the final norm of a model of that depth.
    names = {name: name for name in tensor_shapes(truncated)}
    if not is_tied:
        names["output.weight"] = weight
    return Submodel(truncated, names)


def _without_exits(config: Config, **model: Any) -> Config:
    """Return the configuration without exits and with changed options of `model`, checked."""
    values = config.model_dump()
    # These options belong to the training run, and may not fit another model.
    for section in ("exits", "parallel", "deepspeed", "tuning"):
        del values[section]
    for name in ("initial", "resume"):
        del values["checkpoint"][name]
    values["model"] |= model
    return Config(**values)


@dataclass
class _Parts:
    """Tensors for transformers, which split those of the checkpoint.

    The parts of one tensor are kept until the next tensor is read.
    """

    reader: TensorReader
    submodel: Submodel
    rows: dict[str, Row]
    on_tensor: Callable[[str, int], None] | None
    _ready: dict[str, Tensor] = field(default_factory=dict)

    def get(self, key: str) -> Tensor:
        if key not in self._ready:
            row = self.rows[key]
            self._ready = {}  # free the memory before reading the next tensor
            tensor = self.reader.tensor(self.submodel.origins[row.name])
            if self.on_tensor is not None:
                self.on_tensor(row.name, tensor.numel() * tensor.element_size())
            parts = row.fusion.split(self.submodel.config.model, tensor)
            self._ready = dict(zip(row.keys, parts, strict=True))
        return self._ready.pop(key)


def export_folder(
    reader: TensorReader,
    submodel: Submodel,
    output: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Path:
    """Write a folder that transformers opens as the model `submodel`, and return its path.

    The folder appears only when it is complete. Exits that share the final norm and the output
    weight need no tensors, and transformers' `generate(assistant_early_exit=...)` can use them. The
    tensors of other exits have the prefix "ee_llm.". An entry "ee_llm" in config.json describes
    both. Raises CheckpointError if the output exists, and ConversionError if transformers has no
    equal model.
    """
    given, output = output, Path(output).resolve()
    if output == Path.cwd() or not output.name:
        raise CheckpointError(
            f"--output {given} is the current directory. Pass the path of a new folder."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} already exists. Choose another --output.")
    take_tensors(reader.config(), CheckpointTensors(reader), torch.float32)  # checks them
    config = submodel.config
    dtype = reader.dtype(submodel.origins["embedding.word.weight"])
    settings, table = _settings(reader, config, dtype)
    rows = rows_of(table, config)
    if config.exits.boundaries:
        are_copies = _exits_are_copies(reader, config)
        settings[ENTRY] = exits_entry(config, are_copies)
        if are_copies:
            for name in own_tensors(config):
                del rows[name]
    specs: dict[str, TensorSpec] = {}
    shapes = tensor_shapes(config)
    for name, row in rows.items():
        row_dtype = reader.dtype(submodel.origins[name])
        for key, shape in zip(row.keys, row.shapes(config.model, shapes[name]), strict=True):
            specs[key] = TensorSpec(shape, row_dtype)
    by_key = {key: row for row in rows.values() for key in row.keys}
    parts = _Parts(reader, submodel, by_key, on_tensor)
    directory.check_output(output.parent)
    # A unique name: another export may be writing to the same output.
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    partial = temporary / "model"
    try:
        partial.mkdir()  # with the default permissions, which `temporary` does not have
        _write_files(reader, partial)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_shards(partial, specs, parts.get, max_shard_bytes)
        for path in (*partial.iterdir(), partial):
            sync_path(path)
        _publish(partial, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(given)


def _publish(partial: Path, output: Path) -> None:
    """Rename a complete folder; raises CheckpointError if the output exists by now."""
    try:
        os.rename(partial, output)  # replaces only an empty directory
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{output} already exists: it was created during this conversion. Choose another "
            "--output."
        ) from None
    sync_path(output.parent)


def _settings(
    reader: TensorReader, config: Config, dtype: torch.dtype
) -> tuple[dict[str, Any], Any]:
    """Return config.json, the model's original one where it still holds, and the table."""
    origin: dict[str, Any] = {}
    if (path := reader.path / ORIGIN / SETTINGS).is_file():
        origin = read_object(path)
    try:
        family, settings = write_settings(config, dtype, origin.get("model_type"))
    except SettingsError as error:
        raise ConversionError(f"{reader.path}: {error}") from None
    if origin:
        current = config.model.model_dump()
        options = read_settings(origin).options
        if all(current[name] == value for name, value in options.items()):
            settings = {name: value for name, value in origin.items() if name != ENTRY}
        else:
            kept = ("bos_token_id", "eos_token_id", "pad_token_id")
            settings |= {name: origin[name] for name in kept if name in origin}
    names = [name for name in ("dtype", "torch_dtype") if name in settings]
    settings |= dict.fromkeys(names or ["torch_dtype"], str(dtype).removeprefix("torch."))
    return settings, family.table


def _exits_are_copies(reader: TensorReader, config: Config) -> bool:
    """Return whether every exit equals the final norm and output weight."""
    exits, last = config.exits, config.model.num_layers
    final = output_weight_name(config, last)
    is_shared = all(output_weight_name(config, b) == final for b in exits.boundaries)
    if exits.head != ("norm",) or not is_shared or set(exits.temperatures) != {1.0}:
        return False
    return all(
        torch.equal(reader.tensor(name), reader.tensor(f"exits.{last}.{name.split('.', 2)[2]}"))
        for name in own_tensors(config)
    )


def _write_files(reader: TensorReader, folder: Path) -> None:
    for name, content in companions(reader.path).items():
        if (file := Path(name).name) != SETTINGS:
            (folder / file).write_bytes(content)
    if (tokenizer := reader.tokenizer()) != BYTES:
        kind = Path(tokenizer).suffix
        shutil.copyfile(tokenizer, folder / f"tokenizer{kind}")
