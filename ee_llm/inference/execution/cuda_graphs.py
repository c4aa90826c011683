"""Replay segments as CUDA graphs: one for each segment and bucket of rows, captured on first use.

On a GPU, launching the kernels of a few rows takes longer than running them; a graph is one launch.
Its shapes are fixed, so rows are padded to the next power of two, and each row attends as an entry
of its own over as many blocks as the model has positions for.

Legend of shapes: t rows, h hidden.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.inference.execution.attention import Batch
from ee_llm.inference.execution.head import HiddenRows

# With more rows, the kernels take longer than their launches.
MAX_ROWS = 128

RunSegment = Callable[[int, Tensor, Batch], HiddenRows]


class CudaGraph:
    """One segment for up to `num_rows` rows: static inputs, and the captured launch."""

    def __init__(
        self, run: RunSegment, segment: int, x: Tensor, batch: Batch, num_rows: int
    ) -> None:
        """Capture a segment; all rows of the capture are padding.

        Padding reads and writes the first block, which belongs to no sequence.

        Args:
            run: Function that runs a segment.
            segment: Number of the segment.
            x: Example rows [t, h]; only their width, dtype and device count.
            batch: Batch of the example rows.
            num_rows: Number of rows that the graph runs.
        """
        assert batch.paged is not None, "only paged kernels have fixed shapes"
        self._x = x.new_zeros(num_rows, x.shape[1])
        example = batch.paged
        query_dtype = example.cu_seqlens_q.dtype
        paged = replace(
            example,
            cu_seqlens_q=torch.arange(num_rows + 1, dtype=query_dtype, device=x.device),
            seqused_k=example.seqused_k.new_ones(num_rows),
            block_table=example.block_table.new_zeros(num_rows, example.block_table.shape[1]),
        )
        rows = batch.positions.new_zeros(num_rows)
        self._batch = replace(batch, positions=rows, writes=rows.clone(), paged=paged)
        self._paged = paged
        self._outputs = HiddenRows(self._x, self._x, self._x)

        def work() -> None:
            self._outputs = run(segment, self._x, self._batch)

        self._replay = distributed.record(work)

    def __call__(self, x: Tensor, batch: Batch) -> HiddenRows:
        """Return the rows [t, h] at the end of the segment; the next call overwrites them."""
        assert batch.paged is not None, "only paged kernels have fixed shapes"
        count = len(x)
        inputs = (
            (self._x, x, 0),
            (self._batch.positions, batch.positions, 0),
            (self._batch.writes, batch.writes, 0),
            (self._paged.seqused_k, batch.paged.seqused_k, 1),
            (self._paged.block_table, batch.paged.block_table, 0),
        )
        for target, source, padding in inputs:
            target[:count] = source
            target[count:] = padding
        self._replay()
        return HiddenRows(*(part[:count] for part in self._outputs))


class CudaGraphs:
    """Runs segments as CUDA graphs, and passes that no graph fits, such as prompts, eagerly."""

    def __init__(self, run: RunSegment) -> None:
        self._run = run
        self._graphs: dict[tuple[int, int], CudaGraph] = {}

    def fits(self, num_rows: int, all_attend: bool) -> bool:
        """Return whether a graph runs this many rows; their batch must then be made by row."""
        return all_attend and 0 < num_rows <= MAX_ROWS

    def __call__(self, segment: int, x: Tensor, batch: Batch) -> HiddenRows:
        """Return the result of `ModelStage.run`."""
        if not self.fits(len(x), batch.live is None):
            return self._run(segment, x, batch)
        key = segment, 1 << (len(x) - 1).bit_length()
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(self._run, segment, x, batch, key[1])
        return self._graphs[key](x, batch)
