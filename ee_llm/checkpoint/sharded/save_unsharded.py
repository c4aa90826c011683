"""Writes what an optimizer holds that splits tensors its own way, one whole tensor at a time.

Names and types are those of `checkpoint.sharded`, so that a run goes on from the checkpoint
whatever its optimizer is.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.sharded.agreement import together
from ee_llm.checkpoint.write import TensorSpec, write_tensors


@runtime_checkable
class UnshardedTensors(Protocol):
    """An optimizer with the parameters that it updates, as whole tensors by name."""

    @property
    def steps(self) -> int:
        """Number of updates that it has made."""

    @steps.setter
    def steps(self, steps: int) -> None: ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return all tensors in a fixed order: parameters, and the state of the optimizer."""

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU. Collective."""

    def set_tensor(self, name: str, whole: Tensor) -> None:
        """Take this rank's part of a tensor of the optimizer's state."""


def write_unsharded(
    what: str, path: Path, tensors: UnshardedTensors, keep: Path | None
) -> tuple[int, dict[str, list[str]]]:
    """Write the directory of tensors of a checkpoint from rank 0.

    Returns the optimizer's steps, and the checksums of the blocks for `directory.seal`, which only
    rank 0 has.

    With `keep`, a checkpoint, what is not among `tensors` is copied from it. One tensor at a time
    is in memory. Collective; raises CheckpointError on every rank if any rank fails.
    """
    own = tensors.specs()
    others = iter(own)  # all that are still to be gathered
    checksums: dict[str, list[str]] = {}
    if dist.get_rank() == 0:
        together(what, lambda: checksums.update(_write(path, tensors, own, others, keep)))
    else:
        together(what, lambda: _gather(tensors, others))
    return tensors.steps, checksums


def _write(
    path: Path,
    tensors: UnshardedTensors,
    own: Mapping[str, TensorSpec],
    left: Iterator[str],
    keep: Path | None,
) -> dict[str, list[str]]:
    specs = dict(own)
    try:
        kept = None if keep is None else TensorReader(keep)
        if kept is not None:
            for name in kept.names():
                specs.setdefault(name, TensorSpec(tuple(kept.shape(name)), kept.dtype(name)))

        def get(name: str) -> Tensor:
            if kept is not None and name not in own:
                return kept.tensor(name)
            expected = next(left)
            assert name == expected, f"other ranks give their part of {expected}, not of {name}"
            return tensors.tensor(name)

        return write_tensors(path, specs, get)
    finally:
        _gather(tensors, left)  # whatever failed here, other ranks do not wait


def _gather(tensors: UnshardedTensors, names: Iterator[str]) -> None:
    for name in names:
        tensors.tensor(name)
