"""megatron-core's optimizer against torch's AdamW on unsharded tensors."""

import math

import pytest
import torch

from ee_llm import distributed
from ee_llm.config import OptimizerConfig
from ee_llm.training.optimizer import (
    build_optimizer,
    clear_gradients,
    set_learning_rate,
    take_step,
    use_distributed_optimizer,
    wrap_stages,
)
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

OPTIONS = OptimizerConfig(lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-6, clip_grad=1.0)


class Two(MegatronModule):
    """A matrix with weight decay, and a bias without."""

    def __init__(self, config, dtype, shared=False):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3).to(dtype))
        self.bias = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.weight.shared = shared


def wrap(dtype, pipeline=1, **config):
    grid = distributed.initialize(pipeline=pipeline, timeout_s=20)
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=4,
        num_attention_heads=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **{"calculate_per_token_loss": True} | config,
    )
    module = Two(transformer, dtype, shared=grid.pipeline_rank > 0)
    [chunk] = wrap_stages([module], transformer, data_size=grid.data_size, dtype=dtype)
    return grid, chunk, build_optimizer([chunk], OPTIONS, data_size=grid.data_size, dtype=dtype)


def make(dtype, pipeline=1, **config):
    grid, chunk, optimizer = wrap(dtype, pipeline, **config)
    return grid, chunk.module, optimizer


def set_gradients(module, step):
    """Set gradients that bfloat16 represents exactly; their norm exceeds the limit at step 2."""
    for number, param in enumerate(module.parameters()):
        values = torch.arange(param.numel()).reshape(param.shape) + number + 1
        param.main_grad.copy_(values / 64 * (1 if step == 1 else 16))


def _train(dtype, steps):
    _, module, optimizer = make(dtype)
    norms = []
    for step in range(1, steps + 1):
        set_gradients(module, step)
        set_learning_rate(optimizer, 0.1 / step)
        norms.append(take_step(optimizer, clip_grad=1.0).grad_norm)
    kind = type(optimizer.chained_optimizers[0]).__name__
    return kind, norms, [param.detach().double() for param in module.parameters()]


def reference(steps):
    params = [torch.arange(1.0, 7.0).reshape(2, 3), torch.ones(3)]
    params = [torch.nn.Parameter(param.double()) for param in params]
    adam = torch.optim.AdamW(
        [{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:], "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    norms = []
    for step in range(1, steps + 1):
        for number, param in enumerate(params):
            values = torch.arange(param.numel()).reshape(param.shape) + number + 1
            param.grad = values.double() / 64 * (1 if step == 1 else 16)
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        for group in adam.param_groups:
            group["lr"] = 0.1 / step
        adam.step()
    return norms, params


@pytest.mark.parametrize(
    ("world", "dtype", "kind", "tolerance"),
    [
        (1, torch.float32, "FP32Optimizer", 1e-6),
        (1, torch.float64, "FP32Optimizer", 1e-12),
        (2, torch.float64, "FP32Optimizer", 1e-12),
        (1, torch.bfloat16, "Float16OptimizerWithFloat16Params", 8e-3),
        (2, torch.float32, "DistributedOptimizer", 1e-6),
        (2, torch.bfloat16, "DistributedOptimizer", 8e-3),
    ],
)
def test_equals_adamw_with_clipping_and_decay_groups(world, dtype, kind, tolerance):
    norms, params = reference(4)
    assert norms[0] < 1.0 < norms[1]
    for found_kind, found_norms, found in run_ranks(world, _train, dtype, 4):
        assert found_kind == kind
        assert found_norms == pytest.approx(norms, rel=min(tolerance, 1e-6))
        for one, other in zip(found, params, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance)


def test_class_of_the_optimizer():
    assert use_distributed_optimizer(2, torch.float32)
    assert not use_distributed_optimizer(1, torch.bfloat16)
    assert not use_distributed_optimizer(2, torch.float64)


def _masters():
    _, module, optimizer = make(torch.bfloat16)
    before = module.weight.detach().clone()
    moved = []
    for _ in range(40):
        set_gradients(module, 1)
        set_learning_rate(optimizer, 1e-4)
        take_step(optimizer, clip_grad=0.0)
        moved.append(not torch.equal(module.weight, before))
    return moved


def test_masters_accumulate_updates_below_the_precision_of_bfloat16():
    [moved] = run_ranks(1, _masters)
    assert not moved[0]
    assert moved[-1]


def _tied():
    _, module, optimizer = make(torch.float32, pipeline=2)
    set_gradients(module, 1)
    result = take_step(optimizer, clip_grad=0.0)
    return result.grad_norm, module.weight.detach()


def test_copies_of_a_tied_weight_count_once_and_get_equal_updates():
    (norm, first), (other_norm, second) = run_ranks(2, _tied)
    weight = sum((i / 64) ** 2 for i in range(1, 7))
    bias = sum((i / 64) ** 2 for i in range(2, 5))
    assert norm == other_norm == pytest.approx(math.sqrt(weight + 2 * bias))
    assert torch.equal(first, second)


def _not_finite(bad, pipeline, dtype):
    grid, module, optimizer = make(dtype, pipeline)
    set_gradients(module, 1)
    take_step(optimizer, clip_grad=1.0)
    before = [param.detach().clone() for param in module.parameters()]
    set_gradients(module, 1)
    if grid.rank == 1 or pipeline == 1:
        module.bias.main_grad[1] = bad
    result = take_step(optimizer, clip_grad=1.0)
    assert not result.updated
    assert not math.isfinite(result.grad_norm)
    after = list(module.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert {group["step"] for group in optimizer.param_groups if group["params"]} == {1}
    set_gradients(module, 1)
    return take_step(optimizer, clip_grad=1.0).updated


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("world", "pipeline"), [(2, 2), (2, 1), (1, 1)])
def test_non_finite_gradient_skips_the_step_on_all_ranks(bad, world, pipeline):
    assert run_ranks(world, _not_finite, bad, pipeline, torch.float32) == [True] * world


def _dividing():
    make(torch.float32, calculate_per_token_loss=False)


def test_gradients_must_not_be_divided_by_the_data_parallel_size():
    with pytest.raises(AssertionError, match="calculate_per_token_loss = False"):
        run_ranks(1, _dividing)


def _gradients_after_zero_grad(dtype):
    _, chunk, optimizer = wrap(dtype)
    module = chunk.module
    for _ in range(2):
        optimizer.zero_grad()  # sets `grad` to None
        clear_gradients(chunk)
        for _ in range(2):
            (3 * module.weight.sum()).backward()
        assert torch.equal(module.weight.main_grad, torch.full((2, 3), 6.0).to(dtype).float())
        assert not module.bias.main_grad.any()
        take_step(optimizer, clip_grad=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_to_their_buffer_once(dtype):
    """Either by autograd or by DDP's hooks, in every step, even if `grad` was reset."""
    run_ranks(1, _gradients_after_zero_grad, dtype)
