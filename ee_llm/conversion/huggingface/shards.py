"""Writes safetensors files tensor by tensor.

The format (https://github.com/huggingface/safetensors) is the length of a header, the header in
JSON, and the tensors.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.checkpoint.write import TensorSpec
from ee_llm.conversion.huggingface.folder import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def cut_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Divide the keys, in order, into files of at most `max_bytes` or of one larger tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += spec.num_bytes
    return shards


def write_shards(
    folder: Path, specs: Mapping[str, TensorSpec], get: Callable[[str], Tensor], max_bytes: int
) -> None:
    """Write tensors to one file, or to several with an index; `get` is called in order."""
    shards = cut_shards(specs, max_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], specs, get)
        return
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, keys, specs, get)
        weight_map |= dict.fromkeys(keys, name)
    total = sum(spec.num_bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_file(
    path: Path,
    keys: Iterable[str],
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], Tensor],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        spec, start = specs[key], end
        end += spec.num_bytes
        header[key] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            tensor = get(key)
            assert (tuple(tensor.shape), tensor.dtype) == specs[key], f"{key} differs from its spec"
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
