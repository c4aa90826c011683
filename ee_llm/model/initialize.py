"""Initial parameters as a function of (seed, parameter name), never of the layout.

Every rank draws a parameter's whole tensor from a generator of its own and keeps its part, so that
any tensor, pipeline or data parallel layout starts from the same model, bit for bit.
"""

import torch

from ee_llm.architecture.initial_values import initial_value
from ee_llm.config import Config
from ee_llm.model.specs import FUSED_NORM_NAMES


def canonical_name(name: str) -> str:
    """Return a parameter's name in checkpoints, whatever the layout and the layers' origin."""
    for fused, plain in FUSED_NORM_NAMES.items():
        if fused in name:
            return name.replace(fused, plain)
    return name


def split_over_tensor_ranks(
    full: torch.Tensor, name: str, axis: int, rank: int, size: int, gated: bool
) -> torch.Tensor:
    """Return tensor rank `rank`'s part of a whole parameter.

    A gated MLP's first linear is [gate; up]: each rank holds its part of both, in that order.
    """
    if gated and ".linear_fc1." in name:
        halves = full.chunk(2, dim=axis)
        return torch.cat([half.chunk(size, dim=axis)[rank] for half in halves], dim=axis)
    return full.chunk(size, dim=axis)[rank]


@torch.no_grad()
def initialize(module: torch.nn.Module, config: Config, tensor_rank: int, tensor_size: int) -> None:
    """Fill every parameter of a stage with its initial value."""
    gated = config.model.family == "llama"
    for local_name, parameter in module.named_parameters():
        name = canonical_name(local_name)
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.copy_(initial_value(name, parameter.shape, config))
            continue
        axis = parameter.partition_dim  # type: ignore[attr-defined]
        shape = list(parameter.shape)
        shape[axis] *= tensor_size
        whole = initial_value(name, torch.Size(shape), config)
        parameter.copy_(split_over_tensor_ranks(whole, name, axis, tensor_rank, tensor_size, gated))
