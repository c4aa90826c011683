"""The engine over pipeline stages: a token that leaves early goes on before its row has ended."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from ee_llm import platform
from ee_llm.config import Config
from ee_llm.inference.blocks import BlockManager
from ee_llm.inference.decoder import Decode, Decoder
from ee_llm.inference.execution import Execution
from ee_llm.inference.pipeline_runner import PipelineRunner
from ee_llm.inference.pipeline_scheduler import PipelinePlan, PipelineScheduler
from ee_llm.inference.request import Sequence
from ee_llm.inference.scheduler import Limits
from ee_llm.inference.stage import Stage, cut, shard_of
from ee_llm.inference.weights import take_tensors
from ee_llm.inference.wire import decode_answers


class PipelineEngine(Decoder):
    """Decodes requests over pipeline stages, each of one or several tensor-parallel ranks.

    Every rank makes one; all but the leader call `follow`.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        ranks: platform.ServingGrid,
        dtype: torch.dtype = torch.float32,
        limits: Limits | None = None,
        decode: Decode | None = None,
        device: torch.device | str = "cpu",
        execution: Execution | None = None,
    ) -> None:
        """Take this rank's part of the weights out of `tensors`; decode: for stop strings.

        Raises ValueError if the tensors do not fit the configuration, or the ranks, or the
        execution the device.
        """
        limits = limits or Limits()
        blocks = BlockManager(limits.num_blocks, limits.block_size)
        self.scheduler = PipelineScheduler(limits, blocks, ranks.num_stages)
        super().__init__(config, self.scheduler, decode)
        self._ranks = ranks
        stage = Stage(
            config,
            take_tensors(config, tensors, dtype, device),
            limits.num_blocks * limits.block_size,
            cut(config, ranks.num_stages)[ranks.stage],
            shard_of(config, ranks, (execution or Execution()).linear),
        )
        max_length = config.model.max_seq_length
        self._runner = PipelineRunner(stage, self.boundaries, limits, max_length, ranks, execution)
        self._last_sent = time.monotonic()
        self._is_open = True
        if ranks.is_leader:
            ranks.listen()

    def _advance(self) -> list[Sequence]:
        """Send a pass if there is one, else wait for an answer; return the sequences it changed.

        An exception amid a pass leaves the ranks out of step, so it ends the engine on all of them.
        """
        if not self._is_open:
            raise RuntimeError("the engine was closed, or ended by an exception; make a new one")
        concerned: list[Sequence] = []
        try:
            plan = self.scheduler.schedule()
            if plan is not None:
                concerned += self._send(plan)
            elif time.monotonic() - self._last_sent > self._ranks.timeout_s / 3:
                self._send(self.scheduler.heartbeat())
            concerned += self._receive(wait=plan is None and self.scheduler.num_sent > 0)
        except BaseException:
            self._is_open = False
            self._ranks.leave()
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
        while answer := self._ranks.next_answer(wait=wait):
            _, message = answer
            concerned += self.scheduler.answer(*decode_answers(message))
            wait = False
        return concerned

    def _send(self, plan: PipelinePlan) -> list[Sequence]:
        self._last_sent = time.monotonic()
        return self.scheduler.answer(plan.id, self._runner.lead(plan))
