"""The backends of `parallel.engine`, which reduce gradients and update parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ee_llm import distributed
from ee_llm.checkpoint.sharded.load import load
from ee_llm.checkpoint.sharded.load_unsharded import load_optimizer
from ee_llm.checkpoint.state import TrainState
from ee_llm.config import Config
from ee_llm.training.optimizer import StepResult, build_optimizer, take_step
from ee_llm.training.parallel import ParallelModel
from ee_llm.training.zero.model import ZeroModel
from ee_llm.training.zero.state import ZeroOptimizer


class TrainingBackend(NamedTuple):
    """Functions that build the model and its optimizer, and that take an optimizer step."""

    build_model: Callable[[Config, distributed.Grid, torch.dtype], Any]
    build_optimizer: Callable[[Any, Path | None], tuple[Any, TrainState]]
    """Takes the model and the checkpoint to resume from, None if the model is initialized."""
    take_step: Callable[[Any, Config], StepResult]


def _megatron(model: ParallelModel, resume: Path | None) -> tuple[Any, TrainState]:
    config = model.config
    optimizer = build_optimizer(
        model.chunks, config.optimizer, data_size=model.grid.data_size, dtype=model.dtype
    )
    if resume is None:
        return optimizer, TrainState()
    return optimizer, load(resume, model.stages, optimizer, config)


def _deepspeed(model: ZeroModel, resume: Path | None) -> tuple[Any, TrainState]:
    state = TrainState()
    if resume is not None:
        state = load(resume, model.stages, None, model.config, resumes=True)
    model.start()
    optimizer = ZeroOptimizer(model)
    if resume is not None:
        load_optimizer(resume, optimizer, model.config)
    return optimizer, state


BACKENDS = {
    "megatron": TrainingBackend(
        ParallelModel,
        _megatron,
        lambda optimizer, config: take_step(optimizer, clip_grad=config.optimizer.clip_grad),
    ),
    "deepspeed": TrainingBackend(
        ZeroModel, _deepspeed, lambda optimizer, config: optimizer.model.take_step()
    ),
}
