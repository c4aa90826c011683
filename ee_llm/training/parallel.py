"""The model that the trainer drives: the stages of this rank, connected to those of the others.

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
from ee_llm.data.batches import BatchShape
from ee_llm.distributed.point_to_point import connect
from ee_llm.losses.curricula import depth_weights, enabled_exits
from ee_llm.losses.exit_losses import scheduled_weight
from ee_llm.model.gradients import GradientReducer
from ee_llm.model.layer_dropout import KeptRows, kept_rows
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
    """Return the loss weights at `step` (from 0) of the exits that the step computes, by boundary.

    With `exits.weighting = "weights"` these are all exits, and the final exit has weight 1.
    """
    exits, num_layers = config.exits, config.model.num_layers
    if exits.weighting == "depth":
        boundaries = (*exits.boundaries, num_layers)
        enabled = enabled_exits(
            exits.curriculum,
            step,
            len(boundaries),
            config.training.steps,
            exits.rotation_interval,
        )
        return depth_weights(boundaries, num_layers, exits.depth_scale, enabled)
    weights = {
        boundary: scheduled_weight(
            exits.weight_schedule, initial, weight, exits.schedule_steps, step
        )
        for boundary, initial, weight in zip(
            exits.boundaries, exits.initial_weights, exits.weights, strict=True
        )
    }
    return weights | {num_layers: 1.0}


class StageOnData:
    """A stage with the microbatches and loss weights of the current step, for the runtime.

    `sums` accumulates, per exit, the unweighted loss summed over valid tokens, and the number of
    these tokens. With `all_train` an exit of weight 0 has an autograd graph as well, which produces
    gradients of 0.
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
        self.boundaries: tuple[int, ...] = ()  # of the exits that the step computes
        self.scaling: Sequence[float] = ()
        self.kept_rows: Sequence[KeptRows] = ()
        self.sums: dict[int, torch.Tensor] = {}

    def set_microbatches(
        self,
        microbatches: Sequence[Microbatch],
        factors: dict[int, float],
        scaling: Sequence[float] | None = None,
        kept_rows: Sequence[KeptRows] = (),
    ) -> None:
        """Set the data of the next step and reset `sums`.

        An exit's loss is its loss sum times both factors.

        Args:
            microbatches: The step's microbatches.
            factors: Factor of each exit, by boundary. Exits without one are not computed.
            scaling: Factor of each microbatch, by default 1.
            kept_rows: The samples of each microbatch that run each layer, by default all.
        """
        self.microbatches = microbatches
        self.factors = factors
        self.boundaries = tuple(b for b in self.stage.boundaries if b in factors)
        self.kept_rows = kept_rows
        self.scaling = [1.0] * len(microbatches) if scaling is None else scaling
        self.sums = {}

    def defer_weight_gradients(self) -> AbstractContextManager[Callable[[], None]]:
        """Defer the weight gradients of the backward passes within, as the schedule demands."""
        return self.stage.weight_gradients.defer()

    def forward(
        self, microbatch: int, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the stage's output and the inputs of the exits that the step computes."""
        batch = self.microbatches[microbatch]
        kept = self.kept_rows[microbatch] if self.kept_rows else None
        output, taps = self.chunk(batch.tokens, batch.positions, hidden, kept)
        by_boundary = dict(zip(self.stage.boundaries, taps, strict=True))
        return output, tuple(by_boundary[boundary] for boundary in self.boundaries)

    def exit_loss(self, microbatch: int, index: int, tap: torch.Tensor) -> torch.Tensor:
        """Return an exit's weighted loss of one microbatch, over the step's valid tokens.

        An exit of weight 0 is reported but has no graph, because it would add zeros to the
        gradients; with `all_train` it has one.
        """
        batch = self.microbatches[microbatch]
        boundary = self.boundaries[index]
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
        total = self.sums.get(boundary)
        self.sums[boundary] = reported if total is None else total + reported
        return loss.objective * factor


class ParallelModel:
    """This rank's stages, their pipeline runtimes, and the reductions over the ranks.

    `chunks` are the stages in megatron-core's DDP, which keeps their gradients (`main_grad`).
    """

    def __init__(self, config: Config, grid: distributed.Grid, dtype: torch.dtype) -> None:
        """Build, initialize and connect the stages. Collective over all ranks."""
        self.config = config
        self.grid = grid
        self.dtype = dtype
        self.num_microbatches = config.num_microbatches(grid.world_size)
        indices = range(grid.pipeline_rank, config.parallel.num_stages, grid.pipeline_size)
        self.stages = [Stage(config, index, dtype) for index in indices]
        self.chunks = wrap_stages(
            self.stages, self.stages[0].config, data_size=grid.data_size, dtype=dtype
        )
        self.boundaries = tuple(stages_of_exits(config))
        self._on_data = {
            stage.index: StageOnData(chunk, config)
            for stage, chunk in zip(self.stages, self.chunks, strict=True)
        }
        self._sum_gradients = GradientReducer(config, grid)
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
        """Return shape, dtype and device of the hidden states that stages pass on."""
        config = self.config
        length = config.data.seq_length
        if config.parallel.sequence:
            length //= config.parallel.tensor
        shape = (length, config.training.micro_batch_size, config.model.hidden_size)
        return MessageSpec(shape, self.dtype, distributed.device())

    def forward_backward(
        self, microbatches: Sequence[Microbatch], step: int, spans: list[Span] | None = None
    ) -> dict[int, float]:
        """Compute the gradients of one step and return every exit's mean loss in nats.

        The gradients are those of the mean over the step's valid tokens on all ranks. They are
        complete in `main_grad` on return; with a distributed optimizer, in this data rank's shard
        of it. Without a valid token losses are NaN and gradients 0. Collective over all ranks.

        Args:
            microbatches: This data-parallel rank's microbatches, those that fill bubbles last.
            step: Number of the step, from 0.
            spans: A list to which the times of this rank's actions are added (`Runtime.step`).

        Returns:
            By boundary, the mean loss over the valid tokens that the exit saw on all ranks, for the
            exits that the step computes. It is equal on all ranks, so that a loss that is not
            finite on one rank is finite on none.
        """
        for chunk in self.chunks:
            chunk.train()
            clear_gradients(chunk)
        weights = exit_weights(self.config, step)
        kept = kept_rows(self.config, step, self._samples(microbatches), self._layers())
        self._set_microbatches(microbatches, weights, self._scaling.losses, kept)
        if spans is not None:
            dist.barrier()  # starts the clocks of all ranks together
        self._train.step(spans)
        for chunk, stage in zip(self.chunks, self.stages, strict=True):
            if (factor := self._scaling.gradients[stage.index]) != 1:
                chunk.scale_gradients(factor)
        self._sum_gradients(self.chunks)
        sums = self._loss_sums()
        return mean_losses({boundary: sums[boundary] for boundary in sums if boundary in weights})

    def evaluate(self, steps: Iterable[Sequence[Microbatch]]) -> dict[int, float]:
        """Return every exit's mean loss in nats over the valid tokens of the given global batches.

        The losses are equal on all ranks, and NaN without a valid token. Collective.
        """
        totals = dict.fromkeys(self.boundaries, (0.0, 0.0))
        for chunk in self.chunks:
            chunk.eval()
        for microbatches in steps:
            self._set_microbatches(microbatches, dict.fromkeys(self.boundaries, 1.0))
            self._evaluate.step()
            for boundary, (loss, tokens) in self._loss_sums().items():
                totals[boundary] = (totals[boundary][0] + loss, totals[boundary][1] + tokens)
        return mean_losses(totals)

    def _set_microbatches(
        self,
        microbatches: Sequence[Microbatch],
        weights: dict[int, float],
        scaling: Sequence[Sequence[float]] | None = None,
        kept: Sequence[KeptRows] = (),
    ) -> None:
        """Set the data of the stages, with losses normalized by the valid tokens of all ranks."""
        batches, tokens = on_device(microbatches, self.grid)
        factors = {boundary: weight / tokens for boundary, weight in weights.items()}
        for index, stage in self._on_data.items():
            stage.set_microbatches(
                batches, factors, None if scaling is None else scaling[index], kept
            )

    def _samples(self, microbatches: Sequence[Microbatch]) -> list[range]:
        """Return the positions in the global batch of the rows of each microbatch."""
        rows, data_size = self.config.training.micro_batch_size, self.grid.data_size
        size = rows * data_size * len(microbatches)
        return BatchShape(rows, size, self.grid.data_rank, data_size).offsets()

    def _layers(self) -> list[int]:
        return [int(number) for stage in self.stages for number in stage.layers]

    def _loss_sums(self) -> dict[int, list[float]]:
        return summed_losses(self._on_data.values(), self.boundaries, self.grid)


def on_device(
    microbatches: Sequence[Microbatch], grid: distributed.Grid
) -> tuple[list[Microbatch], float]:
    """Move the data to this rank's device; also return the valid tokens of all data ranks, or 1."""
    batches = [Microbatch(*(x.to(distributed.device()) for x in batch)) for batch in microbatches]
    count = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    dist.all_reduce(count, group=grid.data_group)
    return batches, max(count.item(), 1.0)


def summed_losses(
    stages: Iterable[StageOnData], boundaries: Sequence[int], grid: distributed.Grid
) -> dict[int, list[float]]:
    """Return each exit's loss sum and number of valid tokens, over microbatches and all ranks."""
    sums = torch.zeros((len(boundaries), 2), dtype=torch.float64, device=distributed.device())
    if grid.tensor_rank == 0:  # other tensor ranks have the same sums
        for stage in stages:
            for boundary, total in stage.sums.items():
                sums[boundaries.index(boundary)] = total
    dist.all_reduce(sums)
    return dict(zip(boundaries, sums.tolist(), strict=True))


def mean_losses(sums: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Return each exit's loss per valid token, NaN without valid tokens."""
    return {
        boundary: total / tokens if tokens else math.nan
        for boundary, (total, tokens) in sums.items()
    }
