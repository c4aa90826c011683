"""Writes the tensors of an optimizer with its own sharding, one unsharded tensor at a time.

Names and dtypes are those of `sharded.save`, so that a run with any optimizer can resume from the
checkpoint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.sharded.agreement import fail_together
from ee_llm.checkpoint.write import TensorSpec, write_tensors


@runtime_checkable
class UnshardedTensors(Protocol):
    """An optimizer and the parameters that it updates, as unsharded tensors by name."""

    @property
    def steps(self) -> int:
        """The number of updates made so far."""

    @steps.setter
    def steps(self, steps: int) -> None: ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return all tensors in a fixed order: the parameters and the optimizer's state."""

    def tensor(self, name: str) -> Tensor:
        """Return an unsharded tensor on the CPU. Collective."""

    def set_tensor(self, name: str, whole: Tensor) -> None:
        """Set this rank's part of a tensor of the optimizer's state."""


def write_unsharded(
    what: str, path: Path, tensors: UnshardedTensors, base: Path | None
) -> tuple[int, dict[str, list[str]]]:
    """Write the tensors of a checkpoint from rank 0.

    Collective. Only one tensor at a time is in memory.

    Args:
        what: The start of error messages.
        path: The directory of tensors.
        tensors: The tensors to write.
        base: A checkpoint from which all other tensors are copied, or None.

    Returns:
        The optimizer's steps and, on rank 0 only, the checksums of the blocks for `directory.seal`.

    Raises:
        CheckpointError: Writing failed on some rank. Raised on every rank.
    """
    own = tensors.specs()
    remaining = iter(own)  # the names of the tensors that are still to be gathered
    checksums: dict[str, list[str]] = {}
    if dist.get_rank() == 0:
        fail_together(what, lambda: checksums.update(_write(path, tensors, own, remaining, base)))
    else:
        fail_together(what, lambda: _gather(tensors, remaining))
    return tensors.steps, checksums


def _write(
    path: Path,
    tensors: UnshardedTensors,
    own: Mapping[str, TensorSpec],
    remaining: Iterator[str],
    base: Path | None,
) -> dict[str, list[str]]:
    specs = dict(own)
    try:
        reader = None if base is None else TensorReader(base)
        if reader is not None:
            for name in reader.names():
                specs.setdefault(name, TensorSpec(tuple(reader.shape(name)), reader.dtype(name)))

        def get(name: str) -> Tensor:
            if reader is not None and name not in own:
                return reader.tensor(name)
            expected = next(remaining)
            assert name == expected, f"other ranks are gathering {expected}, not {name}"
            return tensors.tensor(name)

        return write_tensors(path, specs, get)
    finally:
        _gather(tensors, remaining)  # after an error the other ranks must not wait


def _gather(tensors: UnshardedTensors, names: Iterator[str]) -> None:
    for name in names:
        tensors.tensor(name)
