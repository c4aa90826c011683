"""The tensors of a checkpoint by name, and the reference model built from them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import LazyTensors
from ee_llm.checkpoint.format.quantized import is_scale, stored_weight
from ee_llm.checkpoint.read import TensorReader


class CheckpointTensors(LazyTensors):
    """The tensors of a checkpoint by name, read on every access and not cached."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._reader:
            raise KeyError(name)
        return stored_weight(self._reader, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._reader.names() if not is_scale(self._reader, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._reader.shape(name))


def load_reference(
    reader: TensorReader, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ReferenceModel:
    """Return the reference model of a checkpoint of any parallel layout.

    Raises CheckpointError if the checkpoint is damaged or does not fit its own configuration.
    """
    return ReferenceModel(reader.config(), CheckpointTensors(reader), dtype, device)
