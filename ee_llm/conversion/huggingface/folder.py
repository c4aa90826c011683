"""Reads a model folder of Hugging Face: config.json, safetensors and a tokenizer."""

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
"""The dtypes that weights may have, by their names in safetensors files."""

# Buffers may have other dtypes. So do quantized weights, which `check_tensors` rejects.
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
"""Maximum sizes in bytes of files that are read into memory."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Folder:
    """The settings and tensors of a Hugging Face model. Tensors are read on access."""

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
            raise CheckpointError(f"{self.path}: its safetensors files have no tensors")

    def tensor(self, key: str) -> Tensor:
        """Return a tensor, which is mapped from its file."""
        # Open the file each time: the pages of a file that stays mapped count as memory in use.
        try:
            with safe_open(self.files[key], "pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.files[key]}: cannot read {key}: {error}") from None

    def _check_place(self, name: str) -> None:
        """Raise CheckpointError if a file is too large, or a link to outside the folder.

        The Hub's cache has links to files in its folder `blobs`, which are allowed.
        """
        path, folder = self.path / name, self.path.resolve()
        if not path.is_file():
            return
        found = path.resolve()
        is_cache = folder.parent.name == "snapshots"
        is_blob = is_cache and found.parent == folder.parent.parent / "blobs"
        if not is_blob and not found.is_relative_to(folder):
            raise CheckpointError(
                f"{path} is a link to {found}, outside the folder. Replace it by the file"
            )
        limit = _LIMITS.get(name, _LARGEST)
        if name in (*COMPANIONS, INDEX) and (size := found.stat().st_size) > limit:
            raise CheckpointError(
                f"{path} has {size} bytes. Expected at most {limit} bytes of such a file."
            )

    def _find_files(self) -> dict[str, Path]:
        index, single = self.path / INDEX, self.path / SINGLE
        if single.is_file():  # as in transformers, it has priority
            return dict.fromkeys(self._keys(single), single)
        if index.is_file():
            table = read_object(index).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise CheckpointError(f"{index}: expected an object weight_map of keys and files")
            for key, name in table.items():
                if not is_plain_name(name):
                    raise CheckpointError(f"{index}: {key} is in {name!r}, outside the folder")
                if not (self.path / name).is_file():
                    raise CheckpointError(f"{self.path / name} is missing: expected {key} in it")
            for name in sorted(set(table.values())):
                self._check_place(name)
            return {key: self.path / name for key, name in table.items()}
        pickles = sorted(file for kind in PICKLES for file in self.path.glob(kind))
        if pickles:
            raise CheckpointError(
                f"{pickles[0]} is a pickle, which can execute any code when it is read. Save the "
                "model as safetensors first, with transformers' save_pretrained, on a machine "
                "where that is safe."
            )
        raise CheckpointError(f"{single} and {index} are missing: expected one of them")

    def _keys(self, file: Path) -> list[str]:
        try:
            with safe_open(file, "pt") as opened:
                return list(opened.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a complete safetensors file: {error}") from None

    def _read_header(self, file: Path, keys: list[str]) -> None:
        stored = set(self._keys(file))
        for key in sorted(stored.symmetric_difference(keys)):
            what = "has" if key in stored else "does not have"
            raise CheckpointError(f"{file} {what} {key}, which contradicts {INDEX}")
        with safe_open(file, "pt") as opened:
            for key in keys:
                part = opened.get_slice(key)
                if (dtype := (DTYPES | _OTHER_DTYPES).get(part.get_dtype())) is None:
                    raise CheckpointError(
                        f"{file}: {key} has dtype {part.get_dtype()}. Expected one of "
                        f"{', '.join(DTYPES)}. Quantized models are not supported."
                    )
                self.specs[key] = TensorSpec(tuple(part.get_shape()), dtype)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises CheckpointError if there is none."""
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
    raise ConversionError(f"{text} is not a JSON number")
