"""Run a checkpoint's model with exits that it does not have yet, to compute their parameters."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.tensors import Converted, tensor_shapes
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.exits import added
from ee_llm.checkpoint.surgery.rewrite import with_options
from ee_llm.config import Config
from ee_llm.errors import RunError


def with_new_exits(config: Config, boundaries: Sequence[int]) -> Config:
    """Return the configuration of the model with new exits at `boundaries` and no others.

    The final exit's output weight stands in for theirs, which do not exist yet.
    """
    per_exit = {"weights": (), "initial_weights": (), "temperatures": ()}
    exits = {"boundaries": tuple(sorted(boundaries)), "output": "shared", **per_exit}
    return with_options(config, exits=exits)


def tensors_with_new_exits(reader: TensorReader, config: Config) -> Mapping[str, Tensor]:
    """Return the model's tensors for a configuration from `with_new_exits`.

    The new exits start as copies of the model. Tensors are on this rank's device, in float32, or in
    float64 for a float64 checkpoint.
    """
    dtype = reader.dtype("embedding.word.weight")
    dtype = dtype if dtype == torch.float64 else torch.float32
    return Converted(_WithCopies(reader, config), dtype, distributed.device())


def check_finite(boundary: int, dtype: torch.dtype, *sums: Tensor) -> None:
    """Raise RunError if a sum over the hidden states at a boundary, in `dtype`, is not finite."""
    if not all(total.isfinite().all() for total in sums):
        name = str(dtype).removeprefix("torch.")
        raise RunError(
            f"the hidden states after layer {boundary} are not finite in {name}. Check the"
            " checkpoint."
        )


class _WithCopies(Mapping[str, Tensor]):
    """A checkpoint's tensors, and those of exits that it lacks, copied from the model."""

    def __init__(self, reader: TensorReader, config: Config) -> None:
        self._names = dict.fromkeys(tensor_shapes(config))
        self._get = added(reader, config, "copy").get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
