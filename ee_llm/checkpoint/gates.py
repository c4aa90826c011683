"""The gates of a checkpoint's exits: a file beside the tensors, since they are trained afterwards.

The file names the model that the gates were trained for. Commands that write a new checkpoint do
not copy it, because gates predict what one model does.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ee_llm.architecture.gates import PREFIX, gated_boundaries
from ee_llm.architecture.tensors import LazyTensors
from ee_llm.atomic_file import AtomicFile
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.errors import CheckpointError

GATES = "gates.safetensors"
"""Name of the file."""

_MODEL = "fingerprint"


def read_gates(reader: TensorReader) -> dict[str, Tensor]:
    """Return the gate tensors of a checkpoint by name; none if it has no gates.

    Raises CheckpointError if the file is damaged, or its gates were trained for another model.
    """
    path = reader.path / GATES
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            model = (file.metadata() or {}).get(_MODEL)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Remove it, or train the gates again with 'ee-llm"
            " calibrate --train-gate'."
        ) from None
    for name, tensor in tensors.items():
        if not _is_gate(name, tensor):
            raise CheckpointError(
                f"{path}: {name!r}, {tensor.dtype} with shape {list(tensor.shape)}, is not a tensor"
                " of a gate. Remove the file, or train gates with 'ee-llm calibrate --train-gate'."
            )
    if model != (expected := reader.fingerprint()):
        raise CheckpointError(
            f"{path}: the gates were trained for the model with fingerprint {model}, but this one"
            f" has {expected}. Remove it, or train gates with 'ee-llm calibrate --train-gate'."
        )
    return tensors


def _is_gate(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor may be part of a gate; its sizes are checked with the model."""
    found = re.fullmatch(r"gates\.[1-9][0-9]{0,5}\.linear_[12]\.(weight|bias)", name)
    num_dimensions = 2 if name.endswith("weight") else 1
    is_float = tensor.dtype in (torch.float32, torch.float64)
    return found is not None and is_float and tensor.dim() == num_dimensions


def write_gates(reader: TensorReader, tensors: Mapping[str, Tensor]) -> None:
    """Write the gates of a checkpoint and replace existing ones.

    Raises CheckpointError if the directory cannot be written.
    """
    path = reader.path / GATES
    content = save(dict(tensors), {_MODEL: reader.fingerprint()})
    try:
        with AtomicFile(path) as file:
            file.write(content)
            file.commit()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Make the directory writable, or"
            " calibrate a copy of the checkpoint."
        ) from None


def fingerprint_with_gates(reader: TensorReader, gates: Mapping[str, Tensor] | None = None) -> str:
    """Return a fingerprint of the model with its gates: 16 hexadecimal digits.

    gates: gates to use instead of the checkpoint's, by name.
    """
    digest = hashlib.sha256(reader.fingerprint().encode())
    found = read_gates(reader) if gates is None else gates
    for name in sorted(found):
        digest.update(f"\n{name}\n".encode() + found[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def gated_exits(reader: TensorReader) -> frozenset[int]:
    """Return the boundaries of the exits that have a gate; raises CheckpointError."""
    return gated_boundaries(read_gates(reader))


class TensorsWithGates(LazyTensors):
    """The tensors of a checkpoint by name, those of its gates among them."""

    def __init__(self, reader: TensorReader, gates: Mapping[str, Tensor] | None = None) -> None:
        """Read the gates.

        Args:
            reader: The checkpoint.
            gates: Gates to use instead of the checkpoint's, by name.

        Raises:
            CheckpointError: As in `read_gates`.
        """
        self._model = CheckpointTensors(reader)
        self._gates = read_gates(reader) if gates is None else gates

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._gates[name] if name.startswith(PREFIX) else self._model[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._model
        yield from self._gates

    def __len__(self) -> int:
        return len(self._model) + len(self._gates)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name.startswith(PREFIX):
            return tuple(self._gates[name].shape)
        return self._model.shape(name)
