"""The engine: decode requests of all strategies and depths in common batches."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.gates import gated_boundaries
from ee_llm.architecture.tensors import take_tensors
from ee_llm.config import Config
from ee_llm.inference.choices import DeferralMode
from ee_llm.inference.decoding.contrast import contrast_rows
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.runner import Runner
from ee_llm.inference.execution.stage import ModelStage, make_shard, partition_layers
from ee_llm.inference.exits.decision import (
    can_decide_from_summaries,
    decide_exits,
    decide_from_summaries,
    join_results,
    make_query,
    split_by_confidence,
)
from ee_llm.inference.request import ExitResult
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.deferral import Deferral
from ee_llm.inference.scheduling.output import SchedulerOutput
from ee_llm.inference.scheduling.scheduler import Scheduler
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.text.detokenizer import Detokenize

_STEPS_BETWEEN_TARGETS = 16


class Engine(EngineBase):
    """Decodes requests in batches; each token is the one that `generate_reference` decides.

    Other requests, the order of arrival and a full cache do not change a token or its exit, except
    through rounding in the dtype; in float64 they never do.
    """

    def __init__(
        self,
        config: Config,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        scheduler_config: SchedulerConfig | None = None,
        detokenize: Detokenize | None = None,
        device: torch.device | str = "cpu",
        deferral: DeferralMode = "auto",
        ranks: distributed.InferenceGrid | None = None,
        execution: ExecutionConfig | None = None,
    ) -> None:
        """Build the engine from the model's weights by name (see `take_tensors`).

        Args:
            config: The model's configuration.
            tensors: The weights, and those of gates if there are any.
            dtype: Precision to compute in.
            scheduler_config: Limits and the size of the K/V cache.
            detokenize: Function from token ids to text, for stop strings.
            device: Where to compute.
            deferral: "auto" measures the latency of passes and lets rows that did not exit wait for
                others where that pays.
            ranks: Ranks that share the tensors. Each of them builds an engine, and all but the
                leader call `worker_loop`.
            execution: How layers are run.

        Raises:
            UserError: The tensors do not fit the configuration or the ranks, or the device does
                not support `execution`.
        """
        self.scheduler_config = scheduler_config or SchedulerConfig()
        self.scheduler = Scheduler(len(config.exits.boundaries) + 1, self.scheduler_config)
        super().__init__(config, self.scheduler, detokenize, ranks, gated_boundaries(tensors))
        (layer_ranges,) = partition_layers(config)
        stage = ModelStage(
            config,
            take_tensors(config, tensors, dtype, device),
            self.scheduler_config.num_blocks * self.scheduler_config.block_size,
            layer_ranges,
            make_shard(config, ranks, (execution or ExecutionConfig()).linear),
        )
        self.runner = Runner(
            stage, self.scheduler_config, config.model.max_seq_length, ranks, execution
        )
        self.deferral: Deferral | None = None
        if deferral == "auto" and len(layer_ranges) > 1 and (ranks is None or ranks.is_leader):
            max_steps = self.scheduler_config.max_deferred_steps
            self.deferral = Deferral(*self.runner.profile(), max_steps)

    def _advance(self) -> list[Sequence]:
        """Run one pass and return the sequences that it changed.

        After an exception all requests continue with the tokens decided so far, and the cache
        contains nothing of the pass. With several ranks, an interrupt or an exception within a pass
        ends the engine on all of them, because it leaves them out of step.
        """
        start = time.perf_counter()
        output = self.scheduler.schedule()
        if output is None:
            return []
        running = {sequence.slot: sequence for sequence in self.scheduler.running}
        try:
            results = self._results(output, running)
            self._update_deferral(output, results, running, time.perf_counter() - start)
            self.scheduler.apply(output, results)
        except BaseException as error:
            is_in_step = self.runner.is_in_step and isinstance(error, Exception)
            if self.runner.has_workers and not is_in_step:
                self._end()
            else:
                self.scheduler.reset()
                self.runner.clear()
            raise
        return [running[rows.slot] for rows in output.logit_rows]

    def worker_loop(self) -> None:
        """Run passes for the leader until it shuts down; for the other tensor-parallel ranks."""
        self.runner.worker_loop()

    def _shutdown(self) -> None:
        self.runner.shutdown()

    def _results(
        self, output: SchedulerOutput, running: Mapping[int, Sequence]
    ) -> list[ExitResult]:
        queries = [
            make_query(running[rows.slot], position, output.last_segment)
            for rows in output.logit_rows
            for position in range(rows.start, rows.stop)
        ]
        is_summarized = self.runner.has_workers and can_decide_from_summaries(
            queries, output.hidden_queries
        )
        run = self.runner.run_summarized if is_summarized else self.runner.run
        logits, confidences = run(output)
        declined, others = split_by_confidence(queries, confidences)
        if is_summarized:
            return join_results(declined, decide_from_summaries(logits, others))
        if output.early_queries:
            early = self.runner.early_logits(output)
            logits = contrast_rows(logits, early, [query.contrast for query in queries])
        return join_results(declined, decide_exits(logits, others))

    def _update_deferral(
        self,
        output: SchedulerOutput,
        results: Items[ExitResult],
        running: Mapping[int, Sequence],
        seconds: float,
    ) -> None:
        if self.deferral is None:
            return
        for step in output.steps:
            if step.segment == len(self.boundaries) - 1:
                continue
            frontiers = [s for s in step.ranges if s.stop == len(running[s.slot].tokens)]
            exited = [r.exited for r in results] if step is output.steps[-1] else []
            self.deferral.observe(step.segment, exited, len(frontiers) - len(exited))
        rows = [(step.segment, step.num_rows) for step in output.steps]
        num_declined = sum(not results[query.row].exited for query in output.hidden_queries)
        self.deferral.record_latency(rows, len(results) - num_declined, seconds)
        if self.scheduler.step % _STEPS_BETWEEN_TARGETS == 0:
            num_running = len(self.scheduler.running)
            self.scheduler.deferral_targets = self.deferral.targets(num_running)
