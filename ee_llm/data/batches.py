"""Microbatches of one data-parallel rank.

The samples of a step are those at positions [consumed, consumed + global batch size): which rank
and which microbatch has which of them depends on the layout, the set never does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ee_llm.data.dataset import Blend, Location
from ee_llm.errors import DataError


class Microbatch(NamedTuple):
    """What one forward pass reads; tensors on the CPU, shape [b microbatch, s sequence]."""

    tokens: Tensor
    """int64: the input."""
    labels: Tensor
    """int64: what each position predicts, the next token."""
    loss_mask: Tensor
    """float32: 1 where the prediction counts, 0 where not (padding, document boundaries)."""
    positions: Tensor
    """int64: position of each token in its sequence."""


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is divided over data-parallel ranks, microbatches and rows."""

    micro_batch_size: int
    global_batch_size: int
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        per_pass = self.micro_batch_size * self.data_size
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            raise DataError(
                f"training.micro_batch_size = {self.micro_batch_size}, "
                f"training.global_batch_size = {self.global_batch_size}: both must be at least 1"
            )
        if not 0 <= self.data_rank < self.data_size:
            raise DataError(f"data-parallel rank {self.data_rank} of {self.data_size}")
        if self.global_batch_size % per_pass:
            raise DataError(
                f"training.global_batch_size = {self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size x data-parallel size = {self.micro_batch_size} x "
                f"{self.data_size}; the next above is "
                f"{(self.global_batch_size // per_pass + 1) * per_pass}"
            )

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches of each rank in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def offsets(self) -> list[range]:
        """Return, for each microbatch of this rank, its rows' places in the global batch."""
        rows = self.micro_batch_size
        firsts = [
            (m * self.data_size + self.data_rank) * rows for m in range(self.num_microbatches)
        ]
        return [range(first, first + rows) for first in firsts]


class TrainingBatches:
    """An endless iterator over steps; each gives the microbatches of this rank.

    `consumed_samples` is the whole state: an iterator that is made with, or set to, the number of
    another goes on exactly where that one stood, on any layout.
    """

    def __init__(self, blend: Blend, shape: BatchShape, consumed_samples: int = 0) -> None:
        if consumed_samples < 0:
            raise DataError(f"consumed_samples = {consumed_samples}: must be at least 0")
        self.blend = blend
        self.shape = shape
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[list[Microbatch]]:
        return self

    def __next__(self) -> list[Microbatch]:
        start = self.consumed_samples
        step = [
            microbatch(self.blend, [self.blend.locate(start + i) for i in offsets])
            for offsets in self.shape.offsets()
        ]
        self.consumed_samples += self.shape.global_batch_size  # last: an error consumes nothing
        return step


class EvaluationBatches:
    """A fixed set of samples, each once: every iteration gives the same steps in the same order.

    At most `num_steps` global batches, fewer if there are fewer samples; the same number on every
    rank. What the last step lacks in samples is rows of padding, without loss; every step has a
    sample, but the microbatch of a rank may have none.
    """

    def __init__(self, blend: Blend, shape: BatchShape, num_steps: int) -> None:
        if num_steps < 1:
            raise DataError(f"training.eval_steps = {num_steps}: must be at least 1")
        self.blend = blend
        self.shape = shape
        self._locations = blend.once(num_steps * shape.global_batch_size)

    def __len__(self) -> int:
        return -(-len(self._locations) // self.shape.global_batch_size)

    def __iter__(self) -> Iterator[list[Microbatch]]:
        for step in range(len(self)):
            start = step * self.shape.global_batch_size
            batch = self._locations[start : start + self.shape.global_batch_size]
            yield [
                microbatch(self.blend, [batch[i] if i < len(batch) else None for i in offsets])
                for offsets in self.shape.offsets()
            ]


def microbatch(blend: Blend, locations: Sequence[Location | None]) -> Microbatch:
    """Return the rows of `locations` as tensors; None is a row of padding."""
    rows = [blend.row(location) for location in locations]
    return Microbatch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True)))
