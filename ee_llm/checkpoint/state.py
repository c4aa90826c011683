"""What a run is besides its tensors: how far it came, and its random generators."""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ee_llm import platform
from ee_llm.checkpoint.safe import CheckpointError

platform.enable_megatron()
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

STATE = "state.json"
RNG = "rng"
_LATER = {"data", "origin"}  # fields that older checkpoints lack
_COUNTS = ("step", "consumed_samples", "skipped_steps")


@dataclass
class TrainState:
    """How far a run came. The learning rate and the data's order follow from it."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Sequences taken from the training data: the position to go on from."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that JSON can hold."""
    data: list[list[Any]] = field(default_factory=list)
    """Name, bytes of .bin and bytes of .idx of each prefix, as `data_files` has them."""
    origin: str = ""
    """The path in `checkpoint.resume` that the run began at, if it began at one."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any, source: Path) -> "TrainState":
        """Return the state in a checkpoint's JSON; raises CheckpointError if it is none."""
        expected = set(cls.__dataclass_fields__)
        if not isinstance(content, dict) or set(content) | _LATER != expected:
            raise CheckpointError(
                f"{source}: expected the fields {sorted(expected)} of a run's state"
            )
        for name in _COUNTS:
            if type(content[name]) is not int or content[name] < 0:
                raise CheckpointError(f"{source}: {name} is {content[name]!r}, expected a count")
        state = cls(**content)
        if not isinstance(state.origin, str):
            raise CheckpointError(f"{source}: origin is {state.origin!r}, expected a path")
        if not isinstance(state.data, list) or not all(map(_is_data_file, state.data)):
            raise CheckpointError(
                f"{source}: data is {state.data!r}, expected a name and two sizes of each prefix"
            )
        return state


def data_files(prefixes: Sequence[str]) -> list[list[Any]]:
    """Return name, bytes of .bin and bytes of .idx of each prefix; nothing if a file is gone."""
    try:
        return [
            [Path(prefix).name, *(os.stat(f"{prefix}{end}").st_size for end in (".bin", ".idx"))]
            for prefix in prefixes
        ]
    except OSError:  # the run has them open: it can go on, and save
        return []


def _is_data_file(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [str, int, int]


def save_generators(directory: Path, rank: int) -> None:
    """Write the states of this rank's random generators: torch, megatron-core, NumPy, Python."""
    tensors = {f"torch.{name}": state for name, state in platform.rng_state().items()}
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
    path = _path(directory, rank)
    path.parent.mkdir(exist_ok=True)
    save_file({name: state.contiguous().clone() for name, state in tensors.items()}, path)


def load_generators(directory: Path, rank: int) -> None:
    """Restore what `save_generators` wrote for this rank; raises CheckpointError."""
    path = _path(directory, rank)
    try:
        tensors = load_file(path)
        platform.set_rng_state({name: tensors[f"torch.{name}"] for name in platform.rng_state()})
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
            f"{path}: expected the random generators of rank {rank}: {error}"
        ) from error


def _path(directory: Path, rank: int) -> Path:
    return directory / RNG / f"rank-{rank:05d}.safetensors"
