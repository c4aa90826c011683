"""The model as the trainer sees it: one object, whatever ranks its stages live on.

Shapes: s sequence, b microbatch, h hidden.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.data import Microbatch
from ee_llm.distributed.point_to_point import connect
from ee_llm.losses.exit_losses import scheduled_weight
from ee_llm.model.gradients import GradientSums
from ee_llm.model.stage import Stage, stages_of_exits
from ee_llm.pipeline.lower import lower
from ee_llm.pipeline.plan import Plan, forward_only
from ee_llm.pipeline.runtime import MessageSpec, Runtime
from ee_llm.pipeline.schedules.scaling import unbiased_scaling
from ee_llm.pipeline.selection import select_plan
from ee_llm.pipeline.simulate import Span
from ee_llm.training.optimizer import clear_gradients, wrap_stages

distributed.enable_megatron()
from megatron.core.distributed import DistributedDataParallel


def exit_weights(config: Config, step: int) -> dict[int, float]:
    """Return every exit's loss weight at `step` (from 0) by boundary; the final exit's is 1."""
    exits = config.exits
    weights = {
        boundary: scheduled_weight(
            exits.weight_schedule, initial, weight, exits.schedule_steps, step
        )
        for boundary, initial, weight in zip(
            exits.boundaries, exits.initial_weights, exits.weights, strict=True
        )
    }
    return weights | {config.model.num_layers: 1.0}


class StageOnData:
    """A stage with the microbatches and weights of the step at hand: what the runtime drives.

    `sums` gathers each exit's loss, unweighted and summed over valid tokens, and their number.
    With `all_train` an exit of weight 0 has a graph as well, which gives it gradients of 0.
    """

    def __init__(
        self, chunk: DistributedDataParallel | Stage, config: Config, *, all_train: bool = False
    ) -> None:
        self.chunk = chunk
        self.all_train = all_train
        self.stage: Stage = chunk if isinstance(chunk, Stage) else chunk.module
        self.dynamic_token_weights = config.exits.dynamic_token_weights
        self.microbatches: Sequence[Microbatch] = ()
        self.factors: dict[int, float] = {}
        self.scaling: Sequence[float] = ()
        self.sums: dict[int, torch.Tensor] = {}

    def begin(
        self,
        microbatches: Sequence[Microbatch],
        factors: dict[int, float],
        scaling: Sequence[float] | None = None,
    ) -> None:
        """Take the step's data and the factors from an exit's loss sum to its loss.

        One is the exit's, by boundary, the other, if there is one, the microbatch's.
        """
        self.microbatches = microbatches
        self.factors = factors
        self.scaling = [1.0] * len(microbatches) if scaling is None else scaling
        self.sums = {}

    def defer_weight_gradients(self) -> AbstractContextManager[Callable[[], None]]:
        """Keep the weights that the schedule puts off out of the backward passes within."""
        return self.stage.weight_gradients.defer()

    def forward(
        self, microbatch: int, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the stage's output and the inputs of its exits."""
        batch = self.microbatches[microbatch]
        return self.chunk(batch.tokens, batch.positions, hidden)

    def exit_loss(self, microbatch: int, index: int, tap: torch.Tensor) -> torch.Tensor:
        """Return an exit's weighted loss of one microbatch, over the step's valid tokens.

        An exit of weight 0 is reported and has no graph: it would add zeros to the gradients, which
        `all_train` asks for.
        """
        batch = self.microbatches[microbatch]
        boundary = self.stage.boundaries[index]
        factor = self.factors[boundary] * self.scaling[microbatch]
        trains = factor != 0 or self.all_train
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            loss = self.stage.exit_loss(
                boundary,
                tap,
                batch.positions,
                batch.labels,
                batch.loss_mask,
                dynamic_token_weights=self.dynamic_token_weights,
            )
        reported = torch.stack([loss.reported.double(), batch.loss_mask.sum(dtype=torch.float64)])
        seen = self.sums.get(boundary)
        self.sums[boundary] = reported if seen is None else seen + reported
        return loss.objective * factor


class ParallelModel:
    """This rank's stages, their place in the pipeline, and the sums that join the ranks.

    `chunks` are the stages in megatron-core's DDP, which holds their gradients (`main_grad`).
    """

    def __init__(self, config: Config, grid: distributed.Grid, dtype: torch.dtype) -> None:
        """Build, initialise and connect the stages; collective over all ranks."""
        self.config = config
        self.grid = grid
        self.dtype = dtype
        self.num_microbatches = config.num_microbatches(grid.world_size)
        held = range(grid.pipeline_rank, config.parallel.num_stages, grid.pipeline_size)
        self.stages = [Stage(config, index, dtype) for index in held]
        self.chunks = wrap_stages(
            self.stages, self.stages[0].config, data_size=grid.data_size, dtype=dtype
        )
        self.boundaries = tuple(stages_of_exits(config))
        self._on_data = {
            stage.index: StageOnData(chunk, config)
            for stage, chunk in zip(self.stages, self.chunks, strict=True)
        }
        self._sum_gradients = GradientSums(config, grid)
        transport = None
        if grid.pipeline_size > 1:
            transport = connect(grid)

        def runtime(plan: Plan) -> Runtime:
            return Runtime(
                lower(plan),
                grid.pipeline_rank,
                self._on_data,
                transport,
                self.hidden_spec(),
                deferred=config.exits.deferred,
            )

        plan = select_plan(config, self.num_microbatches)
        self._train = runtime(plan)
        self._scaling = unbiased_scaling(plan)
        self._evaluate = runtime(
            forward_only(grid.pipeline_size, self.num_microbatches, config.parallel.virtual)
        )

    def hidden_spec(self) -> MessageSpec:
        """Return shape, type and device of the hidden states that stages hand on."""
        config = self.config
        length = config.data.seq_length
        if config.parallel.sequence:
            length //= config.parallel.tensor
        shape = (length, config.training.micro_batch_size, config.model.hidden_size)
        return MessageSpec(shape, self.dtype, distributed.device())

    def forward_backward(
        self, microbatches: Sequence[Microbatch], step: int, spans: list[Span] | None = None
    ) -> dict[int, float]:
        """Compute the gradients of one step (from 0) and return every exit's mean loss in nats.

        Takes this data-parallel rank's microbatches, those that fill bubbles last. An exit's loss
        is over the valid tokens it saw on all ranks, gradients are those of the mean over the
        step's, in `main_grad`, whole on return (where the optimizer is distributed, in this data
        rank's share of them); without a valid token losses are NaN and gradients 0. Every rank gets
        the same numbers; a loss that is not finite on one rank is not finite on any. `spans`
        gathers the times of this rank's actions (`Runtime.step`).
        """
        for chunk in self.chunks:
            chunk.train()
            clear_gradients(chunk)
        self._begin(microbatches, exit_weights(self.config, step), self._scaling.losses)
        if spans is not None:
            dist.barrier()  # clocks start together
        self._train.step(spans)
        for chunk, stage in zip(self.chunks, self.stages, strict=True):
            if (factor := self._scaling.gradients[stage.index]) != 1:
                chunk.scale_gradients(factor)
        self._sum_gradients(self.chunks)
        return mean_losses(self._loss_sums())

    def evaluate(self, steps: Iterable[Sequence[Microbatch]]) -> dict[int, float]:
        """Return every exit's mean loss in nats over the valid tokens of some global batches.

        NaN if there is no valid token. Every rank gets the same numbers.
        """
        totals = dict.fromkeys(self.boundaries, (0.0, 0.0))
        for chunk in self.chunks:
            chunk.eval()
        for microbatches in steps:
            self._begin(microbatches, dict.fromkeys(self.boundaries, 1.0))
            self._evaluate.step()
            for boundary, (loss, tokens) in self._loss_sums().items():
                totals[boundary] = (totals[boundary][0] + loss, totals[boundary][1] + tokens)
        return mean_losses(totals)

    def _begin(
        self,
        microbatches: Sequence[Microbatch],
        weights: dict[int, float],
        scaling: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Hand the data to the stages, losses normalised by the valid tokens of all ranks."""
        here, tokens = on_device(microbatches, self.grid)
        factors = {boundary: weight / tokens for boundary, weight in weights.items()}
        for index, stage in self._on_data.items():
            stage.begin(here, factors, None if scaling is None else scaling[index])

    def _loss_sums(self) -> dict[int, list[float]]:
        return summed_losses(self._on_data.values(), self.boundaries, self.grid)


def on_device(
    microbatches: Sequence[Microbatch], grid: distributed.Grid
) -> tuple[list[Microbatch], float]:
    """Return the data on this rank's device, and the valid tokens of all data ranks, 1 if none."""
    here = [Microbatch(*(x.to(distributed.device()) for x in batch)) for batch in microbatches]
    count = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in here]).sum()
    dist.all_reduce(count, group=grid.data_group)
    return here, max(count.item(), 1.0)


def summed_losses(
    stages: Iterable[StageOnData], boundaries: Sequence[int], grid: distributed.Grid
) -> dict[int, list[float]]:
    """Return by exit its loss sum and valid tokens, over microbatches and all ranks."""
    sums = torch.zeros((len(boundaries), 2), dtype=torch.float64, device=distributed.device())
    if grid.tensor_rank == 0:  # its peers have the same sums
        for stage in stages:
            for boundary, total in stage.sums.items():
                sums[boundaries.index(boundary)] = total
    dist.all_reduce(sums)
    return dict(zip(boundaries, sums.tolist(), strict=True))


def mean_losses(sums: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Return every exit's loss per valid token from its sum and their number, NaN for none."""
    return {
        boundary: total / tokens if tokens else math.nan
        for boundary, (total, tokens) in sums.items()
    }
