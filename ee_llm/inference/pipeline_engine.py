"""The engine over pipeline stages: a token that leaves early goes on before its row has ended."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.tensors import take_tensors
from ee_llm.config import Config
from ee_llm.errors import RunError
from ee_llm.inference.engine_base import Detokenize, EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.pipeline_runner import PipelineRunner
from ee_llm.inference.execution.stage import ModelStage, make_shard, partition_layers
from ee_llm.inference.execution.wire import decode_results
from ee_llm.inference.request import Sequence
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.pipeline_scheduler import (
    PipelineScheduler,
    PipelineSchedulerOutput,
)
from ee_llm.inference.scheduling.scheduler import SchedulerConfig


class PipelineEngine(EngineBase):
    """Decodes requests over pipeline stages, each of one or several tensor-parallel ranks.

    Every rank makes one; all but the leader call `follow`.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        ranks: distributed.InferenceGrid,
        dtype: torch.dtype = torch.float32,
        scheduler_config: SchedulerConfig | None = None,
        decode: Detokenize | None = None,
        device: torch.device | str = "cpu",
        execution: ExecutionConfig | None = None,
    ) -> None:
        """Take this rank's part of the weights out of `tensors`; decode: for stop strings.

        Raises RequestError if the tensors do not fit the configuration, or the ranks, or the
        execution the device.
        """
        scheduler_config = scheduler_config or SchedulerConfig()
        blocks = BlockManager(scheduler_config.num_blocks, scheduler_config.block_size)
        self.scheduler = PipelineScheduler(scheduler_config, blocks, ranks.num_stages)
        super().__init__(config, self.scheduler, decode)
        self._ranks = ranks
        stage = ModelStage(
            config,
            take_tensors(config, tensors, dtype, device),
            scheduler_config.num_blocks * scheduler_config.block_size,
            partition_layers(config, ranks.num_stages)[ranks.stage],
            make_shard(config, ranks, (execution or ExecutionConfig()).linear),
        )
        max_length = config.model.max_seq_length
        self._runner = PipelineRunner(
            stage, self.boundaries, scheduler_config, max_length, ranks, execution
        )
        self._last_sent = time.monotonic()
        self._is_open = True
        if ranks.is_leader:
            ranks.listen()

    def _advance(self) -> list[Sequence]:
        """Send a pass if there is one, else wait for an answer; return the sequences it changed.

        An exception amid a pass leaves the ranks out of step, so it ends the engine on all of them.
        """
        if not self._is_open:
            raise RunError("the engine was closed, or ended by an exception; make a new one")
        concerned: list[Sequence] = []
        try:
            scheduler_output = self.scheduler.schedule()
            if scheduler_output is not None:
                concerned += self._send(scheduler_output)
            elif time.monotonic() - self._last_sent > self._ranks.timeout_s / 3:
                self._send(self.scheduler.heartbeat())
            concerned += self._receive(
                wait=scheduler_output is None and self.scheduler.num_sent > 0
            )
        except BaseException:
            self._is_open = False
            self._ranks.shutdown()
            raise
        return concerned

    def follow(self) -> None:
        """Run what the leader sends, until it closes. Raises RankLostError if a rank is gone."""
        self._runner.follow()

    def close(self) -> None:
        """Shut down the follower ranks, once the passes on their way are through.

        There is nothing left to do for an engine that was closed, or ended by an exception.
        """
        if not self._is_open:
            return
        self._is_open = False
        while self.scheduler.num_sent:
            self._receive(wait=True)
        self._runner.dismiss()

    def _receive(self, wait: bool) -> list[Sequence]:
        """Take the answers that are there, `wait`: for one at least; return whom they concern."""
        concerned: list[Sequence] = []
        while answer := self._ranks.next_result(wait=wait):
            _, message = answer
            concerned += self.scheduler.answer(*decode_results(message))
            wait = False
        return concerned

    def _send(self, scheduler_output: PipelineSchedulerOutput) -> list[Sequence]:
        self._last_sent = time.monotonic()
        return self.scheduler.answer(scheduler_output.id, self._runner.lead(scheduler_output))
