"""Runs with DeepSpeed, and with megatron-core for comparison."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ee_llm.config import Config
from tests.distributed.runs import losses_of, make_config, tensors_of, train_ranks

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason='deepspeed is not installed: pip install "ee-llm[deepspeed]"',
)
BACKENDS = {
    f"zero-{stage}{'-offload' * offload}": {
        "parallel.engine": "deepspeed",
        "deepspeed.zero_stage": stage,
        "deepspeed.offload_optimizer": offload,
    }
    for stage in (1, 2, 3)
    for offload in (False, True)
}
# With tied exits, the norm of an MLP, and weight decay, which does not apply to norms.
MODEL = {"exits.head": ("mlp", "norm"), "training.eval_interval": 5, "training.eval_steps": 2}


def trained(world_size: int, config: Config) -> str:
    """Return the checkpoint, or the error of the ranks."""
    ends = train_ranks(world_size, config)
    return ends[0]


def run(output: Path, corpus: str, world_size: int = 2, **options: Any) -> Path:
    """Train a run in `output` to its end and return `output`."""
    end = trained(world_size, make_config(output, corpus, **MODEL | options))
    assert Path(end).is_dir(), end
    return output


def assert_same_course(one: Path, other: Path, tolerance: float) -> None:
    """Assert that losses and gradient norms of all steps agree."""
    assert losses_of(one) == pytest.approx(losses_of(other), rel=tolerance)
    assert len(losses_of(one)) >= 5 * 2


def assert_same_end(one: Path | str, other: Path | str, tolerance: float) -> None:
    """Assert that parameters and moments agree, and that both moments exist."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert {name.rpartition(".state.")[2].split(".")[0] for name in first} >= {
        "exp_avg",
        "exp_avg_sq",
    }
    for name, tensor in first.items():
        if name.endswith("linear_qkv.bias"):
            continue  # biases of keys cancel out, so that their gradients are rounding errors
        assert tensor.dtype == second[name].dtype, name
        error = (tensor - second[name]).abs().max() / second[name].abs().max().clamp(min=1e-12)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def parts_held(model: Any) -> dict[str, int]:
    """Return how many elements of parameters and of Adam's two moments this rank has."""
    optimizer = model.engine.optimizer
    held = {id(p): p.numel() for p in model.losses.parameters()}
    moments = [
        value.numel() for state in optimizer.optimizer.state.values() for value in state.values()
    ]
    return {"parameters": sum(held.values()), "moments": sum(moments)}


def all_numbers(checkpoint: Path) -> int:
    """Return the number of parameters of the model in a checkpoint."""
    return sum(
        tensor.numel()
        for name, tensor in tensors_of(checkpoint).items()
        if not name.startswith("optimizer.")
    )
