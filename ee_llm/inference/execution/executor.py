"""Run a stage's layers with the selected attention, optionally compiled or as CUDA graphs."""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

from ee_llm.errors import RequestError
from ee_llm.inference.choices import Attention, Quantize
from ee_llm.inference.execution.attention import Batch, BlockTable, Run
from ee_llm.inference.execution.cuda_graphs import CudaGraphs, RunSegment
from ee_llm.inference.execution.layers import MakeLinear
from ee_llm.inference.execution.linear import Linear
from ee_llm.inference.execution.paged_attention import choose_kernel
from ee_llm.inference.execution.quantization import Int8Linear
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.scheduling.config import SchedulerConfig


@dataclass(frozen=True)
class ExecutionConfig:
    """Options that change speed and rounding, and with `quantize` the weights.

    Attributes:
        attention: "auto" uses the best paged kernel of the device; "gather" copies keys and values
            into one tensor first, as on a CPU.
        cuda_graphs: Replay passes of few rows as CUDA graphs; this needs a paged kernel.
        compile: Run the layers through torch.compile.
        quantize: "int8" keeps the weights of linear layers in 8 bits.
    """

    attention: Attention = "auto"
    cuda_graphs: bool = False
    compile: bool = False
    quantize: Quantize = "none"

    @property
    def linear(self) -> MakeLinear:
        """Class of the linear layers."""
        if self.quantize == "int8":
            return Int8Linear
        return partial(Linear, packs=False) if self.compile else Linear


class Executor:
    """Runs the layer ranges of a stage over its paged cache."""

    def __init__(
        self,
        stage: ModelStage,
        scheduler_config: SchedulerConfig,
        max_length: int,
        execution: ExecutionConfig | None = None,
    ) -> None:
        """Create the block table and select how the layers are run.

        Args:
            stage: The stage.
            scheduler_config: Number of slots and size of blocks.
            max_length: Greatest number of positions of a sequence.
            execution: How layers are run.

        Raises:
            RequestError: This device or layout does not support `execution`.
        """
        execution = execution or ExecutionConfig()
        kernel = choose_kernel(
            execution.attention, stage.device, stage.cache_dtype, scheduler_config.block_size
        )
        if execution.cuda_graphs and kernel is None:
            raise RequestError(
                "cuda_graphs needs a paged attention kernel, and attention ="
                f" {execution.attention!r} selects none on this device. Install FlashAttention, or"
                " turn cuda_graphs off."
            )
        if execution.cuda_graphs and stage.num_ranks > 1:
            raise RequestError(
                f"cuda_graphs does not work with tensor = {stage.num_ranks}: a CUDA graph cannot"
                " contain the communication of tensor-parallel layers. Turn cuda_graphs off, or use"
                " tensor = 1."
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
        self.run: RunSegment = stage.run
        if execution.compile:
            stage.compile()
        self._graphs = CudaGraphs(self.run) if execution.cuda_graphs else None
        if self._graphs is not None:
            self.run = self._graphs

    @property
    def reuses_buffers(self) -> bool:
        """Whether a later pass overwrites the tensors that `run` returned."""
        return self._graphs is not None

    def prepare(self, new_blocks: Items[tuple[int, int, int]], zeroed: Items[int]) -> None:
        """Register new blocks and zero blocks that may hold NaN; call this before a pass.

        Args:
            new_blocks: Newly taken blocks as (slot, index within the sequence, block).
            zeroed: Blocks to zero.
        """
        for slot, index, block in new_blocks:
            self._table.set(slot, index, block)
        for block in zeroed:
            self._stage.zero(block * self._block_size, (block + 1) * self._block_size)

    def batch(self, runs: Items[Run], live: Items[Run] | None) -> Batch:
        """Return the batch for the rows of `runs`, of which `live` attend (None for all)."""
        num_rows = sum(run.num_rows for run in runs)
        by_row = self._graphs is not None and self._graphs.fits(num_rows, live is None)
        return self._table.batch(runs, live, self._dtype, by_row)
