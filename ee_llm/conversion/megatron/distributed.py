"""Reads unsharded tensors from distributed checkpoints of megatron-core (torch_dist).

Their tensors do not depend on the ranks that wrote them. The tensors of layers are stacked along
the first dimension, or have the layer's number in their names.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.read import fill
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.conversion.huggingface.folder import read_object
from ee_llm.conversion.megatron.archive import Archive, iteration_of, namespace
from ee_llm.conversion.megatron.tables import current_name, is_neutral
from ee_llm.errors import CheckpointError

_LAYERS = re.compile(r"decoder\.layers\.(?!\d)")
# Entries besides the model: optimizer, random states, counters.
_OTHERS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state|opt_param_scheduler")


class DistributedCheckpoint:
    """The tensors of a distributed checkpoint by megatron-core's names, layers counted from 0."""

    is_core = True

    def __init__(self, path: Path) -> None:
        """Open a directory; raises CheckpointError if a file is missing, damaged or foreign."""
        self.path = path
        backend = read_object(path / "metadata.json").get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(
                f"{path / 'metadata.json'}: sharded_backend is {backend!r}. Only 'torch_dist' can "
                "be converted (Megatron-LM's --ckpt-format)."
            )
        self.arguments_file = path / safe.COMMON
        content = Archive(self.arguments_file).content
        arguments = namespace(content.get("args")) if isinstance(content, dict) else None
        if arguments is None:
            raise CheckpointError(f"{self.arguments_file} has no args: expected the arguments")
        self.arguments = arguments
        self.iteration = iteration_of(content, self.arguments_file)
        self._entries = safe.read_metadata(path, _is_wanted)
        safe.check_sizes(path, self._entries)
        self._places: dict[str, tuple[str, int | None]] = {}
        for name, entry in self._entries.items():
            self._add(name, entry)
        self.specs = {key: self._spec(*place) for key, place in self._places.items()}
        self.files = dict.fromkeys(self._places, path / safe.METADATA)

    def _add(self, name: str, entry: safe.TensorEntry) -> None:
        if 0 in entry.shape:
            raise CheckpointError(f"{self.path / safe.METADATA}: {name} {entry.shape} is empty")
        places: dict[str, tuple[str, int | None]] = {name: (name, None)}
        if match := _LAYERS.match(name):
            rest = name[match.end() :]
            layers = range(entry.shape[0]) if entry.shape else ()
            places = {f"decoder.layers.{i}.{rest}": (name, i) for i in layers}
        for key, place in places.items():
            key = current_name(key, core=True)
            if key in self._places:
                raise CheckpointError(
                    f"{self.path / safe.METADATA}: {name} and {self._places[key][0]} are both {key}"
                )
            self._places[key] = place

    def _spec(self, name: str, layer: int | None) -> TensorSpec:
        entry = self._entries[name]
        return TensorSpec(entry.shape if layer is None else entry.shape[1:], entry.dtype)

    def tensor(self, key: str) -> Tensor:
        """Read a tensor from the blocks of all ranks."""
        name, layer = self._places[key]
        entry = self._entries[name]
        if layer is None:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            fill(tensor, self.path, name, entry, (0,) * len(entry.shape))
            return tensor
        row = torch.empty((1, *entry.shape[1:]), dtype=entry.dtype)
        fill(row, self.path, name, entry, (layer, *(0,) * (len(entry.shape) - 1)))
        return row[0]


def _is_wanted(name: str) -> bool:
    return not _OTHERS.match(name) and not is_neutral(name)
