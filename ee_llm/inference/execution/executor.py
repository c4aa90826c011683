"""How a stage's layers are run: which attention, kernel by kernel or from recordings, compiled."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ee_llm.errors import RequestError
from ee_llm.inference.execution.attention import Batch, BlockTable, Run
from ee_llm.inference.execution.cuda_graphs import Graphs, RunPiece
from ee_llm.inference.execution.layers import MakeLinear
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.paged_attention import Attention, choose
from ee_llm.inference.execution.quantization import Int8Linear
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.scheduling.scheduler import SchedulerConfig

Quantize = Literal["none", "int8"]


@dataclass(frozen=True)
class ExecutionConfig:
    """Choices that change speed and rounding, and with `quantize` the weights.

    attention: "auto" takes the best kernel over pages that the device has, "gather" copies what is
    read, as on a CPU. graphs: passes of few rows are replayed as CUDA graphs, which needs a kernel
    over pages. compile: layers go through torch.compile. quantize: "int8" keeps weights of linear
    layers in 8 bits.
    """

    attention: Attention = "auto"
    graphs: bool = False
    compile: bool = False
    quantize: Quantize = "none"

    @property
    def linear(self) -> MakeLinear:
        """Return what products with weights are made by."""
        if self.quantize == "int8":
            return Int8Linear
        return partial(Linear, packs=False) if self.compile else Linear


class Executor:
    """Runs pieces of a stage over its paged cache."""

    def __init__(
        self,
        stage: ModelStage,
        scheduler_config: SchedulerConfig,
        max_length: int,
        execution: ExecutionConfig | None = None,
    ) -> None:
        """Make the tables of `SchedulerConfig.max_num_seqs` slots of up to `max_length` positions.

        Raises RequestError, saying why, if the execution can not be had on this device.
        """
        execution = execution or ExecutionConfig()
        kernel = choose(
            execution.attention, stage.device, stage.cache_dtype, scheduler_config.block_size
        )
        if execution.graphs and kernel is None:
            raise RequestError(
                f"graphs need attention over pages, and attention = {execution.attention!r} gathers"
                " here; install FlashAttention, or leave graphs off"
            )
        if execution.graphs and stage.num_ranks > 1:
            raise RequestError(
                f"graphs hold no messages between ranks, and {stage.num_ranks} tensor-parallel"
                " ranks send some in every layer; leave graphs off, or take one rank"
            )
        self._stage = stage
        self._block_size = scheduler_config.block_size
        self._dtype = stage.cache_dtype
        num_blocks = -(-max_length // scheduler_config.block_size)
        self._table = BlockTable(
            scheduler_config.max_num_seqs,
            num_blocks,
            scheduler_config.block_size,
            stage.device,
            kernel,
        )
        self.run: RunPiece = stage.run
        if execution.compile:
            stage.compile()
        self._graphs = Graphs(self.run) if execution.graphs else None
        if self._graphs is not None:
            self.run = self._graphs

    @property
    def reuses_buffers(self) -> bool:
        """Return whether a later pass overwrites the tensors that `run` returned."""
        return self._graphs is not None

    def prepare(self, tables: Items[tuple[int, int, int]], zeroed: Items[int]) -> None:
        """Take note of newly given blocks, and zero those that may hold NaN, before a pass.

        tables: as (slot, index within the sequence, block).
        """
        for slot, index, block in tables:
            self._table.set(slot, index, block)
        for block in zeroed:
            self._stage.zero(block * self._block_size, (block + 1) * self._block_size)

    def batch(self, runs: Items[Run], live: Items[Run] | None) -> Batch:
        """Return what the layers need to know of the rows of `runs`, of which `live` attend."""
        num_rows = sum(run.num_rows for run in runs)
        by_row = self._graphs is not None and self._graphs.takes(num_rows, live is None)
        return self._table.batch(runs, live, self._dtype, by_row)
