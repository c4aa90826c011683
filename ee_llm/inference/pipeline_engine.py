"""The engine for pipeline stages: an early exit starts the next token before the pass has ended."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.gates import gated_boundaries
from ee_llm.architecture.tensors import take_tensors
from ee_llm.config import Config
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.pipeline_runner import PipelineRunner
from ee_llm.inference.execution.stage import ModelStage, make_shard, partition_layers
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.pipeline_scheduler import (
    PipelineScheduler,
    PipelineSchedulerOutput,
)
from ee_llm.inference.scheduling.wire import decode_results
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.text.detokenizer import Detokenize


class PipelineEngine(EngineBase):
    """Decodes requests over pipeline stages, each of one or several tensor-parallel ranks.

    Every rank builds one; all but the leader call `worker_loop`.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        ranks: distributed.InferenceGrid,
        dtype: torch.dtype = torch.float32,
        scheduler_config: SchedulerConfig | None = None,
        detokenize: Detokenize | None = None,
        device: torch.device | str = "cpu",
        execution: ExecutionConfig | None = None,
    ) -> None:
        """Build this rank's part of the engine; the arguments are those of `Engine`.

        Raises:
            UserError: The tensors do not fit the configuration or the ranks, or the device does
                not support `execution`.
        """
        scheduler_config = scheduler_config or SchedulerConfig()
        self.scheduler = PipelineScheduler(scheduler_config, ranks.num_stages)
        super().__init__(config, self.scheduler, detokenize, ranks, gated_boundaries(tensors))
        self._grid = ranks
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
        if ranks.is_leader:
            ranks.listen()

    def _advance(self) -> list[Sequence]:
        """Send a pass if there is one, else wait for a result; return the changed sequences.

        An exception during a pass leaves the ranks out of step, so it ends the engine on all ranks.
        """
        changed: list[Sequence] = []
        try:
            output = self.scheduler.schedule()
            if output is not None:
                changed += self._send(output)
            changed += self._receive(wait=output is None and self.scheduler.num_in_flight > 0)
        except BaseException:
            self._end()
            raise
        return changed

    def worker_loop(self) -> None:
        """Run passes of the leader until it closes; raises RankLostError if a rank is lost."""
        self._runner.worker_loop()

    def _shutdown(self) -> None:
        while self.scheduler.num_in_flight:
            self._receive(wait=True)
        self._runner.shutdown()

    def _receive(self, wait: bool) -> list[Sequence]:
        """Apply the results that have arrived and return the changed sequences.

        wait: wait for at least one result.
        """
        changed: list[Sequence] = []
        while received := self._grid.next_result(wait=wait):
            _, message = received
            changed += self.scheduler.apply(*decode_results(message))
            wait = False
        return changed

    def _send(self, output: PipelineSchedulerOutput) -> list[Sequence]:
        return self.scheduler.apply(output.id, self._runner.run_first_stage(output))
