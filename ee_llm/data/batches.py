"""Microbatches of one data-parallel rank.

The samples of a step are those at positions [consumed, consumed + global batch size). Their
assignment to ranks and microbatches depends on the layout; the set of samples does not.
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
    """The inputs of one forward pass: CPU tensors of shape [b microbatch, s sequence]."""

    tokens: Tensor
    """int64: the input tokens."""
    labels: Tensor
    """int64: the next token at each position, which the model predicts."""
    loss_mask: Tensor
    """float32: 1 where the loss counts, 0 elsewhere (padding, document boundaries)."""
    positions: Tensor
    """int64: the position of each token in its sequence."""


@dataclass(frozen=True)
class BatchShape:
    """The division of a global batch into data-parallel ranks, microbatches and rows."""

    micro_batch_size: int
    global_batch_size: int
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        per_pass = self.micro_batch_size * self.data_size
        if self.micro_batch_size < 1 or self.global_batch_size < 1:
            raise DataError(
                f"training.micro_batch_size = {self.micro_batch_size}, "
                f"training.global_batch_size = {self.global_batch_size}: both must be at least 1."
            )
        if not 0 <= self.data_rank < self.data_size:
            raise DataError(
                f"data-parallel rank {self.data_rank} is outside 0..{self.data_size - 1}."
            )
        if self.global_batch_size % per_pass:
            raise DataError(
                f"training.global_batch_size = {self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size x data-parallel size = {self.micro_batch_size} x "
                f"{self.data_size}. The next multiple is "
                f"{(self.global_batch_size // per_pass + 1) * per_pass}."
            )

    @property
    def num_microbatches(self) -> int:
        """Number of microbatches per rank and step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def offsets(self) -> list[range]:
        """Return the positions in the global batch of the rows of each microbatch of this rank."""
        rows = self.micro_batch_size
        firsts = [
            (m * self.data_size + self.data_rank) * rows for m in range(self.num_microbatches)
        ]
        return [range(first, first + rows) for first in firsts]


class TrainingBatches:
    """Infinite iterator over training steps that yields the microbatches of this rank.

    `consumed_samples` is the complete state: an iterator that is created with, or set to, the value
    of another one continues exactly where that one stopped, on any layout.
    """

    def __init__(self, blend: Blend, shape: BatchShape, consumed_samples: int = 0) -> None:
        if consumed_samples < 0:
            raise DataError(f"consumed_samples = {consumed_samples} must be at least 0.")
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
        self.consumed_samples += self.shape.global_batch_size  # Last: an error consumes nothing.
        return step


class EvaluationBatches:
    """A fixed set of samples without repetition, in the same order in every iteration.

    There are at most `num_steps` global batches, fewer if there are fewer samples, and the same
    number on every rank. Padding rows, which have no loss, complete the last step. Every step has a
    sample, but a microbatch of a rank may consist of padding only.
    """

    def __init__(self, blend: Blend, shape: BatchShape, num_steps: int) -> None:
        if num_steps < 1:
            raise DataError(f"training.eval_steps = {num_steps} must be at least 1.")
        self.blend = blend
        self.shape = shape
        self._locations = blend.distinct_samples(num_steps * shape.global_batch_size)

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
    """Return the rows of `locations` as tensors; None gives a padding row."""
    rows = [blend.row(location) for location in locations]
    return Microbatch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True)))
