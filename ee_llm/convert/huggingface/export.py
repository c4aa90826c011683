"""A checkpoint of ours as a folder that transformers opens: whole, dense, or cut off at an exit."""

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
from ee_llm.convert.huggingface.folder import SETTINGS, read_object
from ee_llm.convert.huggingface.settings import ENTRY, exits_entry, read_settings, write_settings
from ee_llm.convert.huggingface.shards import write_shards
from ee_llm.convert.huggingface.tables import Row, own_tensors, rows_of
from ee_llm.convert.values import SettingsError
from ee_llm.errors import CheckpointError, ConversionError

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Cut:
    """A model made of parts of another: its configuration, and where each tensor comes from."""

    config: Config
    origins: Mapping[str, str]


def whole(config: Config) -> Cut:
    """Return the model as it is."""
    return Cut(config, {name: name for name in tensor_shapes(config)})


def dense(config: Config) -> Cut:
    """Return the model without its early exits."""
    return whole(_with(config))


def truncated(config: Config, boundary: int) -> Cut:
    """Return the ordinary model that ends with the exit at `boundary`.

    Raises ConversionError, with the reason, if there is none such.
    """
    exits = config.exits
    if boundary not in exits.boundaries:
        raise ConversionError(
            f"--truncate-at {boundary}: there is no exit; the model has them at "
            f"{list(exits.boundaries)}"
        )
    reason = ""
    if "norm" not in exits.head:
        reason = "an ordinary model norms what its output weight reads, and the exit does not"
    elif exits.head != ("norm",):
        reason = "an ordinary model has nothing but a norm between its layers and its output"
    elif (temperature := exits.temperatures[exits.boundaries.index(boundary)]) != 1:
        reason = f"an ordinary model has no temperature, and the exit's is {temperature}"
    if reason:
        raise ConversionError(
            f"--truncate-at {boundary} with exits.head = {list(exits.head)} can not be: {reason}"
        )
    weight = output_weight_name(config, boundary)
    is_tied = weight == "embedding.word.weight"
    cut = _with(config, num_layers=boundary, tie_embeddings=is_tied, shape=None)
    # The exit's norm is called as the final norm of a model of that depth is.
    names = {name: name for name in tensor_shapes(cut)}
    if not is_tied:
        names["output.weight"] = weight
    return Cut(cut, names)


def _with(config: Config, **model: Any) -> Config:
    """Return the configuration of a model without exits, checked as a file's is."""
    values = config.model_dump()
    # These are of the run that trained it, and need not fit another model.
    for section in ("exits", "parallel", "deepspeed", "tuning"):
        del values[section]
    for name in ("initial", "resume"):
        del values["checkpoint"][name]
    values["model"] |= model
    return Config(**values)


@dataclass
class _Parts:
    """Their tensors made from ours; what one of ours is split into is kept until the next."""

    reader: TensorReader
    cut: Cut
    rows: dict[str, Row]
    on_tensor: Callable[[str, int], None] | None
    _ready: dict[str, Tensor] = field(default_factory=dict)

    def get(self, key: str) -> Tensor:
        if key not in self._ready:
            row = self.rows[key]
            self._ready = {}  # before the next is read
            whole = self.reader.tensor(self.cut.origins[row.ours])
            if self.on_tensor is not None:
                self.on_tensor(row.ours, whole.numel() * whole.element_size())
            parts = row.fusion.split(self.cut.config.model, whole)
            self._ready = dict(zip(row.theirs, parts, strict=True))
        return self._ready.pop(key)


def export_folder(
    reader: TensorReader,
    cut: Cut,
    output: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Path:
    """Return the folder, whole or not there at all, that transformers opens as the model `cut` is.

    Exits that share the final norm and output weight need no tensors, so that transformers'
    `generate(assistant_early_exit=...)` has them; others' tensors stand under "ee_llm.". An entry
    "ee_llm" in config.json describes both. Raises CheckpointError if the output is there already,
    and ValueError if no model of transformers is this one.
    """
    given, output = output, Path(output).resolve()
    if output == Path.cwd() or not output.name:
        raise CheckpointError(
            f"--output {given} is the directory that you are in; give the name of a new folder"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is there already; choose another --output")
    take_tensors(reader.config(), CheckpointTensors(reader), torch.float32)  # checks them
    config = cut.config
    dtype = reader.dtype(cut.origins["embedding.word.weight"])
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
        found = reader.dtype(cut.origins[name])
        for key, shape in zip(row.theirs, row.shapes(config.model, shapes[name]), strict=True):
            specs[key] = TensorSpec(shape, found)
    by_key = {key: row for row in rows.values() for key in row.theirs}
    parts = _Parts(reader, cut, by_key, on_tensor)
    directory.check_output(output.parent)
    # A name that nobody has: another export may be writing to the same output.
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    partial = aside / "whole"
    try:
        partial.mkdir()  # with the user's own permissions, which `aside` has not
        _write_files(reader, partial)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_shards(partial, specs, parts.get, max_shard_bytes)
        for path in (*partial.iterdir(), partial):
            sync_path(path)
        _publish(partial, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Path(given)


def _publish(partial: Path, output: Path) -> None:
    """Give a whole folder its name; raises CheckpointError if another took it meanwhile."""
    try:
        os.rename(partial, output)  # takes the place of an empty directory, and of nothing else
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{output} is there already, made while this was written; choose another --output"
        ) from None
    sync_path(output.parent)


def _settings(
    reader: TensorReader, config: Config, dtype: torch.dtype
) -> tuple[dict[str, Any], Any]:
    """Return config.json and the table: the model's own settings where it came with them."""
    origin: dict[str, Any] = {}
    if (path := reader.path / ORIGIN / SETTINGS).is_file():
        origin = read_object(path)
    try:
        family, settings = write_settings(config, dtype, origin.get("model_type"))
    except SettingsError as error:
        raise ConversionError(f"{reader.path}: {error}") from None
    if origin:
        now = config.model.model_dump()
        options = read_settings(origin).options
        if all(now[name] == value for name, value in options.items()):
            settings = {name: value for name, value in origin.items() if name != ENTRY}
        else:
            kept = ("bos_token_id", "eos_token_id", "pad_token_id")
            settings |= {name: origin[name] for name in kept if name in origin}
    names = [name for name in ("dtype", "torch_dtype") if name in settings]
    settings |= dict.fromkeys(names or ["torch_dtype"], str(dtype).removeprefix("torch."))
    return settings, family.table


def _exits_are_copies(reader: TensorReader, config: Config) -> bool:
    """Return whether every exit is the final norm and output weight at its boundary."""
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
