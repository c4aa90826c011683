"""The engine: requests of any strategy and depth decoded together, none waiting for the deepest."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Literal

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.tensors import take_tensors
from ee_llm.config import Config
from ee_llm.inference.engine_base import Detokenize, EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.runner import Runner
from ee_llm.inference.execution.stage import ModelStage, make_shard, partition_layers
from ee_llm.inference.exits.decision import (
    decide_exits,
    decide_from_summaries,
    is_short,
    make_query,
)
from ee_llm.inference.request import ExitResult, Sequence
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.deferral import Deferral
from ee_llm.inference.scheduling.scheduler import Scheduler, SchedulerConfig, SchedulerOutput

DeferralMode = Literal["auto", "off"]

_STEPS_BETWEEN_TARGETS = 16


class Engine(EngineBase):
    """Decodes requests in batches; each token is what `generate_reference` would have made.

    Nothing else that runs at the same time, no order of arrival and no lack of room changes a token
    or its exit but by the rounding of the dtype; in float64 not at all.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        scheduler_config: SchedulerConfig | None = None,
        decode: Detokenize | None = None,
        device: torch.device | str = "cpu",
        deferral: DeferralMode = "auto",
        ranks: distributed.InferenceGrid | None = None,
        execution: ExecutionConfig | None = None,
    ) -> None:
        """Take the model's weights by name (see `take_tensors`).

        decode: ids to text, for stop strings. hold: "auto" measures what passes take and lets rows
        that declined an exit wait for others where that pays. ranks: those that share the model's
        tensors; all of them make an engine, and all but the leader call `follow`. Raises
        RequestError if the tensors do not fit the configuration, or the ranks, or the execution the
        device.
        """
        self.scheduler_config = scheduler_config or SchedulerConfig()
        blocks = BlockManager(self.scheduler_config.num_blocks, self.scheduler_config.block_size)
        self.scheduler = Scheduler(len(config.exits.boundaries) + 1, self.scheduler_config, blocks)
        super().__init__(config, self.scheduler, decode)
        (pieces,) = partition_layers(config)
        stage = ModelStage(
            config,
            take_tensors(config, tensors, dtype, device),
            self.scheduler_config.num_blocks * self.scheduler_config.block_size,
            pieces,
            make_shard(config, ranks, (execution or ExecutionConfig()).linear),
        )
        self.runner = Runner(
            stage, self.scheduler_config, config.model.max_seq_length, ranks, execution
        )
        self.deferral: Deferral | None = None
        if deferral == "auto" and len(pieces) > 1 and (ranks is None or ranks.is_leader):
            self.deferral = Deferral(
                *self.runner.profile(), self.scheduler_config.max_deferred_steps
            )

    def _advance(self) -> list[Sequence]:
        """Run one pass and return the sequences that it changed.

        After an exception, unless a rank is lost, all requests are still under way, with the tokens
        decided so far and nothing of the pass in the cache.
        """
        start = time.perf_counter()
        scheduler_output = self.scheduler.schedule()
        if scheduler_output is None:
            self.runner.rest()
            return []
        running = {sequence.slot: sequence for sequence in self.scheduler.running}
        try:
            results = self._verdicts(scheduler_output, running)
            self._hold(scheduler_output, results, running, time.perf_counter() - start)
            self.scheduler.apply(scheduler_output, results)
        except distributed.RankLostError:
            raise
        except BaseException as error:
            # Other ranks are interrupted too, and answer no more; without them all can go on.
            if isinstance(error, Exception) or not self.runner.has_followers:
                self.scheduler.begin_anew()
                self.runner.clear()
            raise
        return [running[token_range.slot] for token_range in scheduler_output.logit_rows]

    def follow(self) -> None:
        """Run what the leader runs, until it closes; for the other tensor-parallel ranks."""
        self.runner.follow()

    def close(self) -> None:
        """Let the ranks that follow this one go."""
        self.runner.dismiss()

    def _verdicts(
        self, scheduler_output: SchedulerOutput, running: Mapping[int, Sequence]
    ) -> list[ExitResult]:
        queries = [
            make_query(running[token_range.slot], position, scheduler_output.last_segment)
            for token_range in scheduler_output.logit_rows
            for position in range(token_range.start, token_range.stop)
        ]
        if self.runner.has_followers and is_short(queries):
            return decide_from_summaries(self.runner.run_summarized(scheduler_output), queries)
        return decide_exits(self.runner.run(scheduler_output), queries)

    def _hold(
        self,
        scheduler_output: SchedulerOutput,
        results: Items[ExitResult],
        running: Mapping[int, Sequence],
        seconds: float,
    ) -> None:
        if self.deferral is None:
            return
        for step in scheduler_output.steps:
            if step.segment == len(self.boundaries) - 1:
                continue
            frontiers = [s for s in step.ranges if s.stop == len(running[s.slot].tokens)]
            left = [v.exited for v in results] if step is scheduler_output.steps[-1] else []
            self.deferral.observe(step.segment, left, len(frontiers) - len(left))
        rows = [(step.segment, step.num_rows) for step in scheduler_output.steps]
        self.deferral.took(rows, len(results), seconds)
        if self.scheduler.step % _STEPS_BETWEEN_TARGETS == 0:
            self.scheduler.deferral_targets = self.deferral.deferral_targets(
                len(self.scheduler.running)
            )
