"""A folder as Hugging Face's libraries save it: config.json, safetensors, a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ee_llm.checkpoint.format.safe import is_plain_name
from ee_llm.checkpoint.tokenizer import COMPANIONS
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.errors import CheckpointError, ConversionError

SETTINGS = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The names of dtypes in safetensors files; those that weights may have."""

# Buffers may have others, and so do quantised weights, which are refused when they are needed.
_OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_LARGEST = 16 * 2**20
_LIMITS = dict.fromkeys(
    ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"), 256 * 2**20
)
"""Sizes in bytes of files that are read as a whole."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Folder:
    """The settings and tensors of a model of Hugging Face's; tensors are read when asked for."""

    def __init__(self, path: str | Path) -> None:
        """Open a folder; raises CheckpointError naming the file that is missing or damaged."""
        self.path = Path(path)
        for name in (*COMPANIONS, SINGLE, INDEX):
            self._check_place(name)
        self.settings = read_object(self.path / SETTINGS)
        self.files = self._find_files()
        self.specs: dict[str, TensorSpec] = {}
        by_file: dict[Path, list[str]] = {}
        for key, file in self.files.items():
            by_file.setdefault(file, []).append(key)
        for file, keys in by_file.items():
            self._read_header(file, keys)
        if not self.specs:
            raise CheckpointError(f"{self.path}: its safetensors files hold no tensor")

    def tensor(self, key: str) -> Tensor:
        """Return a tensor; it is read from its file while it is used."""
        # Opened each time: pages of a file that stays mapped count as memory of this process.
        try:
            with safe_open(self.files[key], "pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.files[key]}: can not read {key}: {error}") from None

    def _check_place(self, name: str) -> None:
        """Raise CheckpointError if a file is too large, or a link that leads out of the folder.

        The hub's cache has files one level up, in `blobs`, and links to them.
        """
        path, folder = self.path / name, self.path.resolve()
        if not path.is_file():
            return
        found = path.resolve()
        is_cache = folder.parent.name == "snapshots"
        is_blob = is_cache and found.parent == folder.parent.parent / "blobs"
        if not is_blob and not found.is_relative_to(folder):
            raise CheckpointError(
                f"{path} is a link to {found}, outside of the folder; put the file itself there"
            )
        limit = _LIMITS.get(name, _LARGEST)
        if name in (*COMPANIONS, INDEX) and (size := found.stat().st_size) > limit:
            raise CheckpointError(
                f"{path} has {size} bytes; expected at most {limit} of such a file, is it another?"
            )

    def _find_files(self) -> dict[str, Path]:
        index, single = self.path / INDEX, self.path / SINGLE
        if single.is_file():  # transformers looks here first, too
            return dict.fromkeys(self._keys(single), single)
        if index.is_file():
            table = read_object(index).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise CheckpointError(f"{index}: expected a table weight_map of keys and files")
            for key, name in table.items():
                if not is_plain_name(name):
                    raise CheckpointError(f"{index}: {key} is in {name!r}, outside of the folder")
                if not (self.path / name).is_file():
                    raise CheckpointError(f"{self.path / name} is missing: expected {key} in it")
            for name in sorted(set(table.values())):
                self._check_place(name)
            return {key: self.path / name for key, name in table.items()}
        pickles = sorted(file for kind in PICKLES for file in self.path.glob(kind))
        if pickles:
            raise CheckpointError(
                f"{pickles[0]} is a pickle, which can run anything when it is read; save the model "
                "as safetensors first, with transformers' save_pretrained on a machine that you "
                "would trust it with"
            )
        raise CheckpointError(f"{single} is missing, and so is {index}: expected one of them")

    def _keys(self, file: Path) -> list[str]:
        try:
            with safe_open(file, "pt") as opened:
                return list(opened.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is no whole safetensors file: {error}") from None

    def _read_header(self, file: Path, keys: list[str]) -> None:
        there = set(self._keys(file))
        for key in sorted(there.symmetric_difference(keys)):
            what = "holds" if key in there else "does not hold"
            raise CheckpointError(f"{file} {what} {key}, and {INDEX} says otherwise")
        with safe_open(file, "pt") as opened:
            for key in keys:
                part = opened.get_slice(key)
                if (dtype := (DTYPES | _OTHER_DTYPES).get(part.get_dtype())) is None:
                    raise CheckpointError(
                        f"{file}: {key} is of type {part.get_dtype()}; expected one of "
                        f"{', '.join(DTYPES)}, not a quantised model"
                    )
                self.specs[key] = TensorSpec(tuple(part.get_shape()), dtype)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: expected a JSON object in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _refuse_constant(text: str) -> None:
    raise ConversionError(f"{text} is no number of JSON")
