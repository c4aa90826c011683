"""Segments run from recordings: one for each segment and bucket of rows, made when first needed.

On a GPU, launching the kernels of a few rows takes longer than running them; a recording is one
launch. Its shapes are fixed, so rows are padded to the next power of two, and each row attends as
an entry of its own over as many blocks as the model has positions for.

Legend of shapes: t rows, m rows of the bucket, h hidden.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.inference.execution.attention import Batch

# From here on the kernels, not their launches, take the time.
MOST_ROWS = 128

RunPiece = Callable[[int, Tensor, Batch], tuple[Tensor, Tensor]]


class Recording:
    """One segment for up to `num_rows` rows: tensors to fill, and what to launch."""

    def __init__(self, run: RunPiece, segment: int, x: Tensor, batch: Batch, num_rows: int) -> None:
        """Record for rows such as x [t, h] and their batch; those of the recording are padding.

        Padding reads and writes the first block, which belongs to no sequence.
        """
        assert batch.paged is not None, "only kernels over pages have fixed shapes"
        self._x = x.new_zeros(num_rows, x.shape[1])
        old = batch.paged
        paged = replace(
            old,
            cu_seqlens_q=torch.arange(num_rows + 1, dtype=old.cu_seqlens_q.dtype, device=x.device),
            seqused_k=old.seqused_k.new_ones(num_rows),
            tables=old.tables.new_zeros(num_rows, old.tables.shape[1]),
        )
        rows = batch.positions.new_zeros(num_rows)
        self._batch = replace(batch, positions=rows, writes=rows.clone(), paged=paged)
        self._paged = paged
        self._outcome: tuple[Tensor, ...] = ()

        def work() -> None:
            self._outcome = run(segment, self._x, self._batch)

        self._launch = distributed.record(work)

    def __call__(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rows [t, h] after the segment, and after its last attention alone.

        They are overwritten by the next call.
        """
        assert batch.paged is not None, "only kernels over pages have fixed shapes"
        count = len(x)
        filled = (
            (self._x, x, 0),
            (self._batch.positions, batch.positions, 0),
            (self._batch.writes, batch.writes, 0),
            (self._paged.seqused_k, batch.paged.seqused_k, 1),
            (self._paged.tables, batch.paged.tables, 0),
        )
        for target, source, padding in filled:
            target[:count] = source
            target[count:] = padding
        self._launch()
        after, attended = self._outcome
        return after[:count], attended[:count]


class Graphs:
    """Runs segments from recordings; passes that fit none, as prompts, kernel by kernel."""

    def __init__(self, run: RunPiece) -> None:
        self._run = run
        self._recordings: dict[tuple[int, int], Recording] = {}

    def takes(self, num_rows: int, all_attend: bool) -> bool:
        """Return whether so many rows are run from a recording; their batch is to be by row."""
        return all_attend and 0 < num_rows <= MOST_ROWS

    def __call__(self, segment: int, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what `Stage.run` does."""
        if not self.takes(len(x), batch.live is None):
            return self._run(segment, x, batch)
        key = segment, 1 << (len(x) - 1).bit_length()
        if key not in self._recordings:
            self._recordings[key] = Recording(self._run, segment, x, batch, key[1])
        return self._recordings[key](x, batch)
