"""DeepSpeed's ZeRO in the place of megatron-core's DDP and optimizer: data parallel alone.

Every process runs the whole model. A microbatch is one forward and one backward pass, in which
DeepSpeed gathers parameters (stage 3) and adds gradients up where they belong (stages 2 and 3).
ZeRO: Rajbhandari et al., arXiv 1910.02054.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.data import Microbatch
from ee_llm.model.stage import Stage, stages_of_exits
from ee_llm.pipeline.simulate import Span
from ee_llm.training.adam import FusedAdam
from ee_llm.training.optimizer import StepResult
from ee_llm.training.parallel import (
    StageOnData,
    exit_weights,
    mean_losses,
    on_device,
    summed_losses,
)


class Losses(torch.nn.Module):
    """The model and the losses of its exits as one forward pass, which is what DeepSpeed drives."""

    def __init__(self, stage: Stage, config: Config) -> None:
        super().__init__()
        self.stage = stage
        # All parameters take part in each step: ZeRO does not notice one that sits a step out.
        self.on_data = StageOnData(stage, config, all_train=True)

    def forward(self, microbatch: int) -> torch.Tensor:
        """Return the weighted sum of all exits' losses of one microbatch of the step at hand."""
        trains_backbone = torch.is_grad_enabled() and not self.stage.is_frozen
        with torch.set_grad_enabled(trains_backbone):
            _, taps = self.on_data.forward(microbatch, None)
        losses = [self.on_data.exit_loss(microbatch, index, tap) for index, tap in enumerate(taps)]
        return torch.stack(losses).sum()


class ZeroModel:
    """The whole model, its data and its losses, with the interface of `ParallelModel`.

    `engine` is DeepSpeed's, built by `start` when the parameters have their first values.
    """

    def __init__(self, config: Config, grid: distributed.Grid, dtype: torch.dtype) -> None:
        """Build and initialise the model; raises UserError where deepspeed can not be imported."""
        distributed.deepspeed()
        self.config, self.grid, self.dtype = config, grid, dtype
        self.num_microbatches = config.num_microbatches(grid.world_size)
        self.stages = [Stage(config, 0, dtype)]
        self.boundaries = tuple(stages_of_exits(config))
        self.losses = Losses(self.stages[0], config)
        self.engine: Any = None
        self._left_over = False  # gradients of a step that was not taken

    def start(self) -> None:
        """Hand the parameters, which have their values, over to DeepSpeed. Collective."""
        trained = [p for p in self.losses.parameters() if p.requires_grad]
        settings = engine_settings(
            self.config, self.num_microbatches, sum(parameter.numel() for parameter in trained)
        )
        self.engine, *_ = distributed.deepspeed().initialize(
            model=self.losses,
            optimizer=_adam(trained, self.config),
            config=settings,
            mpu=_Groups(self.grid),
            dist_init_required=False,
        )

    def forward_backward(
        self, microbatches: Sequence[Microbatch], step: int, spans: list[Span] | None = None
    ) -> dict[int, float]:
        """Compute the gradients of one step (from 0) and return every exit's mean loss in nats.

        Losses and gradients are those of `ParallelModel.forward_backward`; the gradients stay with
        DeepSpeed until `take_step`. If a loss is not finite they become NaN on all ranks.
        """
        assert spans is None, "logging.trace_steps is refused with this engine"
        self.drop_gradients()
        self.engine.train()
        # DeepSpeed divides sums over ranks by their number.
        self._begin(microbatches, exit_weights(self.config, step), self.grid.data_size)
        means: dict[int, float] = {}
        for index in range(len(microbatches)):
            loss = self.engine(index)
            is_last = index == len(microbatches) - 1
            if is_last:
                means = mean_losses(self._loss_sums())
                if not all(math.isfinite(mean) for mean in means.values()):
                    loss = loss * math.nan
            self.engine.set_gradient_accumulation_boundary(is_last)
            self.engine.backward(loss, scale_wrt_gas=False)
        self._left_over = True
        return means

    def evaluate(self, steps: Iterable[Sequence[Microbatch]]) -> dict[int, float]:
        """Return what `ParallelModel.evaluate` does."""
        totals = dict.fromkeys(self.boundaries, (0.0, 0.0))
        self.engine.eval()
        for microbatches in steps:
            self._begin(microbatches, dict.fromkeys(self.boundaries, 1.0))
            with torch.no_grad():
                for index in range(len(microbatches)):
                    self.engine(index)
            for boundary, (loss, tokens) in self._loss_sums().items():
                totals[boundary] = (totals[boundary][0] + loss, totals[boundary][1] + tokens)
        return mean_losses(totals)

    def take_step(self) -> StepResult:
        """Update the parameters from the gradients, clipped, unless these are not finite.

        Collective.
        """
        self.engine.step()
        self._left_over = False
        return StepResult(self.engine.was_step_applied(), float(self.engine.get_global_grad_norm()))

    def drop_gradients(self) -> None:
        """Make DeepSpeed forget the gradients of a step that was not taken.

        They are NaN, and skipping them is the one way to do so that all of its stages have.
        """
        if self._left_over:
            result = self.take_step()
            assert not result.updated, "a step was left that could have been taken"

    def _begin(
        self, microbatches: Sequence[Microbatch], weights: dict[int, float], scale: int = 1
    ) -> None:
        here, tokens = on_device(microbatches, self.grid)
        factors = {boundary: scale * weight / tokens for boundary, weight in weights.items()}
        self.losses.on_data.begin(here, factors)

    def _loss_sums(self) -> dict[int, list[float]]:
        return summed_losses([self.losses.on_data], self.boundaries, self.grid)


def engine_settings(config: Config, num_microbatches: int, num_trained: int) -> dict[str, Any]:
    """Return DeepSpeed's own configuration for a run that trains `num_trained` numbers.

    Gradients are added and sent in float32, as megatron-core's are here.
    """
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        # Buffers are as large as this even where less is ever in them.
        "reduce_bucket_size": min(500_000_000, num_trained),
        "allgather_bucket_size": min(500_000_000, num_trained),
        # Norms and biases are cheaper to keep than to gather.
        "stage3_param_persistence_threshold": 4 * config.model.hidden_size,
        # One part per group: Adam counts a group's steps each time that it meets a part of it.
        "sub_group_size": 10**15,
    }
    if config.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": distributed.has_cuda()}
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Our Adam is torch's fused kernel, on a CPU too: nothing has to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.training.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _adam(trained: Sequence[torch.nn.Parameter], config: Config) -> FusedAdam:
    """Return Adam over two groups; norms and biases (one-dimensional) have no weight decay."""
    options = config.optimizer
    groups = [
        {
            "params": [p for p in trained if (p.dim() == 1) == is_flat],
            "weight_decay": 0.0 if is_flat else options.weight_decay,
            "lr_mult": 1.0,
        }
        for is_flat in (False, True)
    ]
    return FusedAdam(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )


class _Groups:
    """The process groups of a grid under the names that DeepSpeed asks for.

    Without them it would make its own, whose waits parallel.timeout_s does not bound.
    """

    def __init__(self, grid: distributed.Grid) -> None:
        self._grid = grid

    def get_data_parallel_group(self) -> Any:
        return self._grid.data_group

    def get_data_parallel_world_size(self) -> int:
        return self._grid.data_size

    def get_data_parallel_rank(self) -> int:
        return self._grid.data_rank

    def get_model_parallel_group(self) -> Any:
        return self._grid.tensor_group

    def get_model_parallel_world_size(self) -> int:
        return self._grid.tensor_size

    def get_model_parallel_rank(self) -> int:
        return self._grid.tensor_rank
