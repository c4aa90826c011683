"""Build megatron-core's optimizer for the stages of a model, and take optimizer steps.

Gradients are final: summed over data-parallel ranks and over copies of tied weights.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.errors import UserError
from ee_llm.training import adam

distributed.enable_megatron()
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class OptimizerOptions(Protocol):
    """The options of the optimizer's configuration that this module reads."""

    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def clip_grad(self) -> float: ...


class StepResult(NamedTuple):
    """The result of one optimizer step."""

    updated: bool
    """False if the gradients were not finite. Then nothing changed, not even the step count."""
    grad_norm: float
    """Global norm before clipping, in which tied weights count once."""


def use_distributed_optimizer(data_size: int, dtype: torch.dtype) -> bool:
    """Return whether the optimizer's state is sharded over the data-parallel ranks.

    In float64 every rank keeps a full copy, because megatron-core's distributed optimizer does not
    support float64.
    """
    return data_size > 1 and dtype != torch.float64


def wrap_stages(
    stages: Sequence[MegatronModule],
    config: TransformerConfig,
    *,
    data_size: int,
    dtype: torch.dtype,
) -> list[DistributedDataParallel]:
    """Wrap the stages in megatron-core's DDP, which keeps gradients in contiguous buffers.

    Gradients are summed, in float32 for bfloat16 parameters. They must not be divided by the number
    of ranks, because the losses are already normalized (`config.calculate_per_token_loss`).
    """
    if not config.calculate_per_token_loss:
        raise UserError(
            "TransformerConfig.calculate_per_token_loss = False is not supported, because "
            "megatron-core then divides the gradients by the data-parallel size. Set it to True."
        )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype == torch.bfloat16,
        use_distributed_optimizer=use_distributed_optimizer(data_size, dtype),
        overlap_grad_reduce=False,
    )
    chunks = [DistributedDataParallel(config, ddp_config, stage) for stage in stages]
    for chunk in chunks:
        # With several buckets the distributed optimizer of 0.16.1 saves moments at wrong offsets.
        assert all(len(buffer.buckets) == 1 for buffer in chunk.buffers), "one bucket per buffer"
        if _accumulates_in_place(chunk):
            chunk.grad_accs.clear()  # DDP's hooks on these nodes would add a second time
        clear_gradients(chunk)
    return chunks


def clear_gradients(chunk: DistributedDataParallel) -> None:
    """Set all gradients of a stage to zero before the first backward pass of a step.

    If the buffers have the dtype of the parameters, autograd adds to them directly. DDP's hooks
    would do it in Python, parameter by parameter (docs/reference/benchmarks.md).
    """
    chunk.zero_grad_buffer()
    if _accumulates_in_place(chunk):
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.grad = parameter.main_grad


def _accumulates_in_place(chunk: DistributedDataParallel) -> bool:
    return not chunk.ddp_config.grad_reduce_in_fp32


def build_optimizer(
    stages: Sequence[DistributedDataParallel],
    options: OptimizerOptions,
    *,
    data_size: int,
    dtype: torch.dtype,
) -> MegatronOptimizer:
    """Return megatron-core's AdamW over the trainable parameters of the DDP-wrapped `stages`.

    bfloat16 parameters have float32 master weights. Biases and norms (one-dimensional parameters)
    have no weight decay. Parameters marked `shared` (copies of a tied weight on other pipeline
    stages) are updated but do not count in the gradient norm. Collective over all ranks, including
    those without trainable parameters.
    """
    adam.install()
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        clip_grad=0.0,  # `take_step` clips, because it checks the norm before the update
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=use_distributed_optimizer(data_size, dtype),
    )
    optimizer = get_megatron_optimizer(
        config, list(stages), config_overrides=get_standard_config_overrides(config)
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group, starting with the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]


@torch.no_grad()
def take_step(optimizer: MegatronOptimizer, *, clip_grad: float) -> StepResult:
    """Update the parameters from the final gradients, clipped to the global norm `clip_grad`.

    `clip_grad` 0 disables clipping. If the norm is not finite, which is then so on all ranks,
    parameters, moments and step counts do not change. Collective over all ranks.
    """
    if optimizer.prepare_grads():
        return StepResult(False, math.inf)  # the gradient scaler found an overflow
    grad_norm = _grad_norm(optimizer)
    if not math.isfinite(grad_norm):
        return StepResult(False, grad_norm)
    if clip_grad > 0 and grad_norm > clip_grad:
        gradients = list(_gradients(optimizer))
        if gradients:
            # megatron-core and torch add the same small constant against a norm of zero.
            torch._foreach_mul_(gradients, clip_grad / (grad_norm + 1e-6))
    return StepResult(bool(optimizer.step_with_ready_grads()), grad_norm)


def _grad_norm(optimizer: MegatronOptimizer) -> float:
    """Return the global norm of the gradients, computed in their own precision.

    megatron-core computes it in float32. With clipped gradients that would limit float64 runs,
    which compare layouts, to seven digits. Collective over all ranks.
    """
    if optimizer.config.params_dtype != torch.float64:
        return float(optimizer.get_grad_norm())
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    gradients = [grad for part in parts for grad in part.get_main_grads_for_grad_norm()]
    total = torch.zeros((), dtype=torch.float64, device=distributed.device())
    for grad in gradients:
        total += grad.square().sum()
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return math.sqrt(float(total))


def _gradients(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                yield param.grad
