"""Restores an optimizer that splits tensors its own way, one whole tensor at a time."""

from pathlib import Path

import torch.distributed as dist

from ee_llm.checkpoint.read import OPTIMIZER_PREFIX, TensorReader
from ee_llm.checkpoint.sharded.agreement import together
from ee_llm.checkpoint.sharded.generators import load_generators
from ee_llm.checkpoint.sharded.load import compare_tensors, saved_layout
from ee_llm.checkpoint.sharded.save import layout
from ee_llm.checkpoint.sharded.save_unsharded import UnshardedTensors
from ee_llm.config import Config


def load_optimizer(path: str | Path, tensors: UnshardedTensors, config: Config) -> None:
    """Give an optimizer its state from a checkpoint, and this rank its random generators.

    The parameters are loaded already, and the checkpoint is known to fit the run (`load`).
    Collective. Raises CheckpointError, before anything is changed, if the checkpoint's state is
    not of exactly the parameters that the run trains.
    """
    what = f"can not load {path}"
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

    together(what, check)
    [reader] = opened

    def fill() -> None:
        for name in wanted:
            tensors.set_tensor(name, reader.tensor(name))
        tensors.steps = reader.manifest["optimizer_steps"]
        if saved_layout(reader) == layout(config):
            load_generators(reader, dist.get_rank())

    together(what, fill)
