"""Restores an optimizer with its own sharding of tensors, one unsharded tensor at a time."""

from pathlib import Path

import torch.distributed as dist

from ee_llm.checkpoint.read import OPTIMIZER_PREFIX, TensorReader
from ee_llm.checkpoint.sharded.agreement import fail_together
from ee_llm.checkpoint.sharded.generators import load_generators
from ee_llm.checkpoint.sharded.load import compare_tensors, saved_layout
from ee_llm.checkpoint.sharded.save import layout
from ee_llm.checkpoint.sharded.save_unsharded import UnshardedTensors
from ee_llm.config import Config


def load_optimizer(path: str | Path, tensors: UnshardedTensors, config: Config) -> None:
    """Load the state of an optimizer and this rank's random generators from a checkpoint.

    Call `load` first: it loads the parameters and checks that the checkpoint fits the run.
    Collective. Raises CheckpointError, before it changes anything, if the checkpoint's optimizer
    state does not cover exactly the parameters that the run trains.
    """
    what = f"cannot load {path}"
    wanted = {
        name: spec.shape
        for name, spec in tensors.specs().items()
        if name.startswith(OPTIMIZER_PREFIX)
    }
    opened: list[TensorReader] = []

    def check() -> None:
        reader = TensorReader(path)
        compare_tensors(
            reader, {name: tuple(reader.shape(name)) for name in reader.names()}, wanted
        )
        opened.append(reader)

    fail_together(what, check)
    [reader] = opened

    def fill() -> None:
        for name in wanted:
            tensors.set_tensor(name, reader.tensor(name))
        tensors.steps = reader.manifest["optimizer_steps"]
        if saved_layout(reader) == layout(config):
            load_generators(reader, dist.get_rank())

    fail_together(what, fill)
