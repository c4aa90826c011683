"""The model that the trainer drives: the stages of this rank, connected to those of the others.

Shapes: s sequence, b microbatch, h hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.data import Microbatch
from ee_llm.data.batches import BatchShape
from ee_llm.distributed.point_to_point import connect
from ee_llm.losses.distillation import Distillation, vocab_parallel_argmax
from ee_llm.losses.exit_losses import exit_loss
from ee_llm.losses.exit_sums import ExitSums, Validation, add_sums, validation_of
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
from ee_llm.training.schedule import exit_weights

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel


class StageOnData:
    """A stage with the microbatches and loss weights of the current step, for the runtime.

    `sums` accumulates, per exit, the unweighted loss summed over valid tokens, the number of these
    tokens, and after `add_agreement` how many of them agree with the final exit. With `all_train`
    an exit of weight 0 has an autograd graph as well, which produces gradients of 0.
    """

    def __init__(
        self, chunk: DistributedDataParallel | Stage, config: Config, *, all_train: bool = False
    ) -> None:
        self.chunk = chunk
        self.all_train = all_train
        self.stage: Stage = chunk if isinstance(chunk, Stage) else chunk.module
        self.dynamic_token_weights = config.exits.dynamic_token_weights
        self.config = config
        self.validates = False
        self.microbatches: Sequence[Microbatch] = ()
        self.factors: dict[int, float] = {}
        self.boundaries: tuple[int, ...] = ()  # of the exits that the step computes
        self.scaling: Sequence[float] = ()
        self.kept_rows: Sequence[KeptRows] = ()
        self.sums: dict[int, torch.Tensor] = {}
        self.predictions: dict[int, list[torch.Tensor]] = {}  # by exit, of each microbatch [s, b]
        self._teacher_logits: torch.Tensor | None = None  # of the current microbatch

    def set_microbatches(
        self,
        microbatches: Sequence[Microbatch],
        factors: dict[int, float],
        scaling: Sequence[float] | None = None,
        kept_rows: Sequence[KeptRows] = (),
        *,
        validates: bool = False,
    ) -> None:
        """Set the data of the next step and reset `sums` and `predictions`.

        An exit's loss is its loss sum times both factors.

        Args:
            microbatches: The step's microbatches.
            factors: Factor of each exit, by boundary. Exits without one are not computed.
            scaling: Factor of each microbatch, by default 1.
            kept_rows: The samples of each microbatch that run each layer, by default all.
            validates: Whether the losses are cross entropies and `predictions` are kept, whatever
                the objective.
        """
        self.validates = validates
        self.microbatches = microbatches
        self.factors = factors
        self.boundaries = tuple(b for b in self.stage.boundaries if b in factors)
        self.kept_rows = kept_rows
        self.scaling = [1.0] * len(microbatches) if scaling is None else scaling
        self.sums, self.predictions, self._teacher_logits = {}, {}, None

    @property
    def distills(self) -> bool:
        """Whether the losses of the current step need `set_final_hidden`."""
        return self.config.distills and not self.validates

    def defer_weight_gradients(self) -> AbstractContextManager[Callable[[], None]]:
        """Defer the weight gradients of the backward passes within, as the schedule demands."""
        return self.stage.weight_gradients.defer()

    def forward(
        self, microbatch: int, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the stage's output and the inputs of the exits that the step computes.

        If exits distill, the output of the last stage is the normalized one.
        """
        batch = self.microbatches[microbatch]
        kept = self.kept_rows[microbatch] if self.kept_rows else None
        last_layer = None if self.validates else self.config.depth
        output, taps = self.chunk(batch.tokens, batch.positions, hidden, kept, last_layer)
        by_boundary = dict(zip(self.stage.boundaries, taps, strict=False))
        if self.distills and self.stage.is_last:
            output = self.stage.normalized_final(output)
        return output, tuple(by_boundary[boundary] for boundary in self.boundaries)

    def set_final_hidden(self, microbatch: int, hidden: torch.Tensor) -> None:
        """Compute the logits that the exits learn, from the output of the last stage."""
        if self.boundaries:
            with torch.no_grad():
                self._teacher_logits = self.stage.final_logits(hidden)

    def exit_loss(self, microbatch: int, index: int, tap: torch.Tensor) -> torch.Tensor:
        """Return an exit's weighted loss of one microbatch, over the step's valid tokens.

        To distill, call `set_final_hidden` first. An exit of weight 0 is reported but has no graph,
        because it would add zeros to the gradients; with `all_train` it has one.
        """
        batch = self.microbatches[microbatch]
        boundary = self.boundaries[index]
        factor = self.factors[boundary] * self.scaling[microbatch]
        trains = factor != 0 or self.all_train
        group = parallel_state.get_tensor_model_parallel_group()
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            logits = self.stage.exit_logits(boundary, tap, batch.positions)
            is_final = boundary == self.stage.final_boundary
            loss = exit_loss(
                logits,
                batch.labels.t(),
                batch.loss_mask.t(),
                group=group,
                dynamic_token_weights=self.dynamic_token_weights and not is_final,
                distillation=self._distillation(),
            )
        if self.validates:
            self.predictions.setdefault(boundary, []).append(vocab_parallel_argmax(logits, group))
        if index == len(self.boundaries) - 1:
            self._teacher_logits = None
        tokens = batch.loss_mask.sum(dtype=torch.float64)
        reported = torch.stack([loss.reported.double(), tokens, torch.zeros_like(tokens)])
        total = self.sums.get(boundary)
        self.sums[boundary] = reported if total is None else total + reported
        return loss.objective * factor

    def _distillation(self) -> Distillation | None:
        if self._teacher_logits is None:
            return None
        tuning = self.config.tuning
        return Distillation(self._teacher_logits, tuning.temperature, tuning.objective == "both")

    def add_agreement(self, final: torch.Tensor) -> None:
        """Count in `sums` the valid tokens that agree with the final exit's.

        Args:
            final: The final exit's `predictions`, stacked: [microbatches, s, b].
        """
        mask = torch.stack([batch.loss_mask.t() for batch in self.microbatches])
        for boundary, predictions in self.predictions.items():
            agreeing = (torch.stack(predictions) == final) * mask
            self.sums[boundary][2] += agreeing.sum(dtype=torch.float64)


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
        sums = self._exit_sums()
        return {boundary: sums[boundary].mean_loss() for boundary in sums if boundary in weights}

    def evaluate(self, steps: Iterable[Sequence[Microbatch]]) -> Validation:
        """Return the losses and agreement of all exits over the given global batches.

        They are equal on all ranks, and NaN without a valid token. The model must have its final
        exit (`Config.is_whole`). Collective.
        """
        totals = dict.fromkeys(self.boundaries, ExitSums())
        for chunk in self.chunks:
            chunk.eval()
        for microbatches in steps:
            self._set_microbatches(
                microbatches, dict.fromkeys(self.boundaries, 1.0), validates=True
            )
            self._evaluate.step()
            final = self._final_predictions()
            for stage in self._on_data.values():
                stage.add_agreement(final)
            add_sums(totals, self._exit_sums())
        return validation_of(totals)

    def _final_predictions(self) -> torch.Tensor:
        """Return the final exit's most probable tokens [microbatches, s, b]. Collective."""
        grid, training = self.grid, self.config.training
        last = self._on_data.get(self.config.parallel.num_stages - 1)
        if last is not None:
            tokens = torch.stack(last.predictions[self.config.model.num_layers])
        else:
            shape = (self.num_microbatches, self.config.data.seq_length, training.micro_batch_size)
            tokens = torch.empty(shape, dtype=torch.int64, device=distributed.device())
        if grid.pipeline_size > 1:
            dist.broadcast(tokens, grid.pipeline_ranks[-1], group=grid.pipeline_group)
        return tokens

    def _set_microbatches(
        self,
        microbatches: Sequence[Microbatch],
        weights: dict[int, float],
        scaling: Sequence[Sequence[float]] | None = None,
        kept: Sequence[KeptRows] = (),
        *,
        validates: bool = False,
    ) -> None:
        """Set the data of the stages, with losses normalized by the valid tokens of all ranks."""
        batches, tokens = on_device(microbatches, self.grid)
        factors = {boundary: weight / tokens for boundary, weight in weights.items()}
        for index, stage in self._on_data.items():
            stage.set_microbatches(
                batches,
                factors,
                None if scaling is None else scaling[index],
                kept,
                validates=validates,
            )

    def _samples(self, microbatches: Sequence[Microbatch]) -> list[range]:
        """Return the positions in the global batch of the rows of each microbatch."""
        rows, data_size = self.config.training.micro_batch_size, self.grid.data_size
        size = rows * data_size * len(microbatches)
        return BatchShape(rows, size, self.grid.data_rank, data_size).offsets()

    def _layers(self) -> list[int]:
        return [int(number) for stage in self.stages for number in stage.layers]

    def _exit_sums(self) -> dict[int, ExitSums]:
        return exit_sums(self._on_data.values(), self.boundaries, self.grid)


def on_device(
    microbatches: Sequence[Microbatch], grid: distributed.Grid
) -> tuple[list[Microbatch], float]:
    """Move the data to this rank's device; also return the valid tokens of all data ranks, or 1."""
    batches = [Microbatch(*(x.to(distributed.device()) for x in batch)) for batch in microbatches]
    count = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    dist.all_reduce(count, group=grid.data_group)
    return batches, max(count.item(), 1.0)


def exit_sums(
    stages: Iterable[StageOnData], boundaries: Sequence[int], grid: distributed.Grid
) -> dict[int, ExitSums]:
    """Return the sums of each exit over microbatches and all ranks."""
    sums = torch.zeros((len(boundaries), 3), dtype=torch.float64, device=distributed.device())
    if grid.tensor_rank == 0:  # other tensor ranks have the same sums
        for stage in stages:
            for boundary, total in stage.sums.items():
                sums[boundaries.index(boundary)] = total
    dist.all_reduce(sums)
    return {b: ExitSums(*values) for b, values in zip(boundaries, sums.tolist(), strict=True)}
