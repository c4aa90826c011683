"""Saves and restores the states of the random number generators of each rank."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ee_llm import distributed
from ee_llm.checkpoint.read import RNG, TensorReader
from ee_llm.errors import CheckpointError

distributed.enable_megatron()
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def save_generators(directory: Path, rank: int) -> None:
    """Write the states of this rank's torch, megatron-core, NumPy and Python generators."""
    tensors = {f"torch.{name}": state for name, state in distributed.rng_state().items()}
    for name, state in get_cuda_rng_tracker().get_states().items():
        tensors[f"megatron.{name}"] = state.cpu()
    numpy_state: Any = np.random.get_state(legacy=False)
    tensors["numpy.keys"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    counts = [numpy_state["state"]["pos"], numpy_state["has_gauss"]]
    tensors["numpy.position"] = torch.tensor(counts)
    tensors["numpy.gauss"] = torch.tensor([numpy_state["gauss"]], dtype=torch.float64)
    version, internal, python_gauss = random.getstate()
    tensors["python"] = torch.tensor([version, *internal])
    gaussians = [] if python_gauss is None else [python_gauss]
    tensors["python.gauss"] = torch.tensor(gaussians, dtype=torch.float64)
    path = directory / _name(rank)
    path.parent.mkdir(exist_ok=True)
    save_file({name: state.contiguous().clone() for name, state in tensors.items()}, path)


def load_generators(reader: TensorReader, rank: int) -> None:
    """Restore the states that `save_generators` wrote for this rank; raises CheckpointError."""
    path, content = reader.path / _name(rank), reader.checksums.read(_name(rank))
    try:
        tensors = load(content)
        distributed.set_rng_state(
            {name: tensors[f"torch.{name}"] for name in distributed.rng_state()}
        )
        prefix = "megatron."
        tracked = {
            name.removeprefix(prefix): state
            for name, state in tensors.items()
            if name.startswith(prefix)
        }
        get_cuda_rng_tracker().set_states(tracked)
        position, has_gauss = tensors["numpy.position"].tolist()
        keys = tensors["numpy.keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy.gauss"].item()))
        version, *internal = tensors["python"].tolist()
        python_gauss = next(iter(tensors["python.gauss"].tolist()), None)
        random.setstate((version, tuple(internal), python_gauss))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected the random generator states of rank {rank}: {error}"
        ) from error


def _name(rank: int) -> str:
    return f"{RNG}/rank-{rank:05d}.safetensors"
