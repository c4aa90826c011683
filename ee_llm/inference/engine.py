"""The engine: requests of any strategy and depth decoded together, none waiting for the deepest."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Literal

import torch
from torch import Tensor

from ee_llm import platform
from ee_llm.config import Config
from ee_llm.inference.blocks import BlockManager
from ee_llm.inference.decoder import Decode, Decoder
from ee_llm.inference.execution import Execution
from ee_llm.inference.holding import Holding
from ee_llm.inference.judge import is_short, judge, judge_summaries, question
from ee_llm.inference.request import Sequence, Verdict
from ee_llm.inference.runner import Runner
from ee_llm.inference.scheduler import Limits, Plan, Scheduler
from ee_llm.inference.stage import Stage, cut, shard_of
from ee_llm.inference.weights import take_tensors

Hold = Literal["auto", "off"]

_STEPS_BETWEEN_HOLDS = 16


class Engine(Decoder):
    """Decodes requests in batches; each token is what `generate_reference` would have made.

    Nothing else that runs at the same time, no order of arrival and no lack of room changes a token
    or its exit but by the rounding of the dtype; in float64 not at all.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        limits: Limits | None = None,
        decode: Decode | None = None,
        device: torch.device | str = "cpu",
        hold: Hold = "auto",
        ranks: platform.ServingGrid | None = None,
        execution: Execution | None = None,
    ) -> None:
        """Take the model's weights by name (see `take_tensors`).

        decode: ids to text, for stop strings. hold: "auto" measures what passes take and lets rows
        that declined an exit wait for others where that pays. ranks: those that share the model's
        tensors; all of them make an engine, and all but the leader call `follow`. Raises ValueError
        if the tensors do not fit the configuration, or the ranks, or the execution the device.
        """
        self.limits = limits or Limits()
        blocks = BlockManager(self.limits.num_blocks, self.limits.block_size)
        self.scheduler = Scheduler(len(config.exits.boundaries) + 1, self.limits, blocks)
        super().__init__(config, self.scheduler, decode)
        (pieces,) = cut(config)
        stage = Stage(
            config,
            take_tensors(config, tensors, dtype, device),
            self.limits.num_blocks * self.limits.block_size,
            pieces,
            shard_of(config, ranks, (execution or Execution()).linear),
        )
        self.runner = Runner(stage, self.limits, config.model.max_seq_length, ranks, execution)
        self.holding: Holding | None = None
        if hold == "auto" and len(pieces) > 1 and (ranks is None or ranks.is_leader):
            self.holding = Holding(*self.runner.profile(), self.limits.max_hold)

    def _advance(self) -> list[Sequence]:
        """Run one pass and return the sequences that it changed.

        After an exception, unless a rank is lost, all requests are still under way, with the tokens
        decided so far and nothing of the pass in the cache.
        """
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            self.runner.rest()
            return []
        running = {sequence.slot: sequence for sequence in self.scheduler.running}
        try:
            verdicts = self._verdicts(plan, running)
            self._hold(plan, verdicts, running, time.perf_counter() - start)
            self.scheduler.apply(plan, verdicts)
        except platform.RankLostError:
            raise
        except BaseException as error:
            # Other ranks are interrupted too, and answer no more; without them all can go on.
            if isinstance(error, Exception) or not self.runner.has_followers:
                self.scheduler.begin_anew()
                self.runner.clear()
            raise
        return [running[span.slot] for span in plan.heads]

    def follow(self) -> None:
        """Run what the leader runs, until it closes; for the other tensor-parallel ranks."""
        self.runner.follow()

    def close(self) -> None:
        """Let the ranks that follow this one go."""
        self.runner.dismiss()

    def _verdicts(self, plan: Plan, running: Mapping[int, Sequence]) -> list[Verdict]:
        questions = [
            question(running[span.slot], position, plan.last_segment)
            for span in plan.heads
            for position in range(span.start, span.stop)
        ]
        if self.runner.has_followers and is_short(questions):
            return judge_summaries(self.runner.run_shortly(plan), questions)
        return judge(self.runner.run(plan), questions)

    def _hold(
        self,
        plan: Plan,
        verdicts: Items[Verdict],
        running: Mapping[int, Sequence],
        seconds: float,
    ) -> None:
        if self.holding is None:
            return
        for part in plan.parts:
            if part.segment == len(self.boundaries) - 1:
                continue
            frontiers = [s for s in part.spans if s.stop == len(running[s.slot].tokens)]
            left = [v.left for v in verdicts] if part is plan.parts[-1] else []
            self.holding.observe(part.segment, left, len(frontiers) - len(left))
        rows = [(part.segment, part.num_rows) for part in plan.parts]
        self.holding.took(rows, len(verdicts), seconds)
        if self.scheduler.step % _STEPS_BETWEEN_HOLDS == 0:
            self.scheduler.holds = self.holding.holds(len(self.scheduler.running))
