"""Data-parallel training with DeepSpeed's ZeRO instead of megatron-core's DDP and optimizer.

Every process runs the whole model. A microbatch is one forward and one backward pass, in which
DeepSpeed gathers parameters (stage 3) and reduces gradients to their owners (stages 2 and 3).
ZeRO: Rajbhandari et al., arXiv 1910.02054.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.data import Microbatch
from ee_llm.losses.exit_sums import ExitSums, Validation, add_sums, validation_of
from ee_llm.model.stage import Stage, stages_of_exits
from ee_llm.pipeline.simulate import Span
from ee_llm.training.adam import FusedAdam
from ee_llm.training.optimizer import StepResult
from ee_llm.training.parallel import StageOnData, exit_sums, on_device
from ee_llm.training.schedule import exit_weights


class Losses(torch.nn.Module):
    """The model and the losses of its exits as one module with one forward pass, for DeepSpeed."""

    def __init__(self, stage: Stage, config: Config) -> None:
        super().__init__()
        self.stage = stage
        # ZeRO does not handle a parameter without a gradient in a step.
        self.on_data = StageOnData(stage, config, all_train=True)

    def forward(self, microbatch: int) -> torch.Tensor:
        """Return the weighted sum of all exits' losses for one microbatch of the current step."""
        trains_backbone = torch.is_grad_enabled() and not self.stage.is_frozen
        with torch.set_grad_enabled(trains_backbone):
            output, taps = self.on_data.forward(microbatch, None)
        if self.on_data.distills:
            self.on_data.set_final_hidden(microbatch, output)
        losses = [self.on_data.exit_loss(microbatch, index, tap) for index, tap in enumerate(taps)]
        return torch.stack(losses).sum()


class ZeroModel:
    """The whole model and its losses, with the interface of `ParallelModel`.

    `engine` is DeepSpeed's engine, which `start` builds after the parameters are initialized.
    """

    def __init__(self, config: Config, grid: distributed.Grid, dtype: torch.dtype) -> None:
        """Build and initialize the model. Raises UserError if deepspeed cannot be imported."""
        distributed.deepspeed()
        self.config, self.grid, self.dtype = config, grid, dtype
        self.num_microbatches = config.num_microbatches(grid.world_size)
        self.stages = [Stage(config, 0, dtype)]
        self.boundaries = tuple(stages_of_exits(config))
        self.losses = Losses(self.stages[0], config)
        self.engine: Any = None
        self._has_gradients = False  # of a step that was not taken

    def start(self) -> None:
        """Pass the initialized parameters to DeepSpeed. Collective."""
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

        Losses and gradients equal those of `ParallelModel.forward_backward`. The gradients stay in
        DeepSpeed until `take_step`. If a loss is not finite, they become NaN on all ranks.
        """
        assert spans is None, "the configuration excludes logging.trace_steps with this engine"
        self.drop_gradients()
        self.engine.train()
        # The scale compensates for DeepSpeed, which averages gradients over the ranks.
        # ZeRO needs a gradient of every parameter, so exits that a curriculum disables run as well.
        trained = self.config.trained_exits
        weights = dict.fromkeys(trained, 0.0) | exit_weights(self.config, step)
        self._set_microbatches(microbatches, weights, self.grid.data_size)
        means: dict[int, float] = {}
        for index in range(len(microbatches)):
            loss = self.engine(index)
            is_last = index == len(microbatches) - 1
            if is_last:
                sums = self._exit_sums()
                means = {boundary: sums[boundary].mean_loss() for boundary in trained}
                if not all(math.isfinite(mean) for mean in means.values()):
                    loss = loss * math.nan
            self.engine.set_gradient_accumulation_boundary(is_last)
            self.engine.backward(loss, scale_wrt_gas=False)
        self._has_gradients = True
        return means

    def evaluate(self, steps: Iterable[Sequence[Microbatch]]) -> Validation:
        """Return the results that `ParallelModel.evaluate` returns."""
        totals = dict.fromkeys(self.boundaries, ExitSums())
        self.engine.eval()
        for microbatches in steps:
            weights = dict.fromkeys(self.boundaries, 1.0)
            self._set_microbatches(microbatches, weights, validates=True)
            with torch.no_grad():
                for index in range(len(microbatches)):
                    self.engine(index)
            on_data = self.losses.on_data
            on_data.add_agreement(torch.stack(on_data.predictions[self.config.model.num_layers]))
            add_sums(totals, self._exit_sums())
        return validation_of(totals)

    def take_step(self) -> StepResult:
        """Update the parameters from the clipped gradients if these are finite. Collective."""
        self.engine.step()
        self._has_gradients = False
        return StepResult(self.engine.was_step_applied(), float(self.engine.get_global_grad_norm()))

    def drop_gradients(self) -> None:
        """Discard the gradients of a step that was not taken.

        They are NaN, so DeepSpeed skips the step. No other way works with all ZeRO stages.
        """
        if self._has_gradients:
            result = self.take_step()
            assert not result.updated, "discarded gradients that were finite"

    def _set_microbatches(
        self,
        microbatches: Sequence[Microbatch],
        weights: dict[int, float],
        scale: int = 1,
        *,
        validates: bool = False,
    ) -> None:
        batches, tokens = on_device(microbatches, self.grid)
        factors = {boundary: scale * weight / tokens for boundary, weight in weights.items()}
        self.losses.on_data.set_microbatches(batches, factors, validates=validates)

    def _exit_sums(self) -> dict[int, ExitSums]:
        return exit_sums([self.losses.on_data], self.boundaries, self.grid)


def engine_settings(config: Config, num_microbatches: int, num_trained: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run that trains `num_trained` parameters.

    Gradients are accumulated and reduced in float32, as with megatron-core.
    """
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero_stage,
        # DeepSpeed allocates buffers of this size even for smaller models.
        "reduce_bucket_size": min(500_000_000, num_trained),
        "allgather_bucket_size": min(500_000_000, num_trained),
        # Norms and biases are cheaper to replicate than to gather.
        "stage3_param_persistence_threshold": 4 * config.model.hidden_size,
        # One subgroup per group: Adam would count a step for each subgroup.
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
        # FusedAdam uses torch's fused kernel, also on a CPU, so that nothing has to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.training.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _adam(trained: Sequence[torch.nn.Parameter], config: Config) -> FusedAdam:
    """Return Adam with two groups. Norms and biases (one-dimensional) have no weight decay."""
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
    """The process groups of a grid, with the interface that DeepSpeed expects.

    Without it DeepSpeed would create its own groups, to which parallel.timeout_s does not apply.
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
