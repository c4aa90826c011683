"""Initialize parameters as a function of (seed, parameter name), independently of the layout.

Every rank draws the unsharded tensor of a parameter from a separate generator and keeps its shard,
so that all tensor-, pipeline- and data-parallel layouts start from the same model, bit for bit.
"""

import torch

from ee_llm.architecture.initial_values import initial_value
from ee_llm.architecture.tensor_parallel import tensor_split
from ee_llm.config import Config
from ee_llm.model.specs import FUSED_NORM_NAMES


def canonical_name(name: str) -> str:
    """Return a parameter's name in checkpoints, which does not depend on the layers' library."""
    for fused, plain in FUSED_NORM_NAMES.items():
        if fused in name:
            return name.replace(fused, plain)
    return name


@torch.no_grad()
def initialize(module: torch.nn.Module, config: Config, tensor_rank: int, tensor_size: int) -> None:
    """Set every parameter of a stage to its initial value."""
    for local_name, parameter in module.named_parameters():
        name = canonical_name(local_name)
        split = tensor_split(name, config.model)
        dim = _megatron_split_dim(parameter)
        assert dim == (split and split.dim), f"megatron-core splits {name} in dimension {dim}"
        if split is None:
            parameter.copy_(initial_value(name, parameter.shape, config))
            continue
        unsharded = initial_value(name, split.unsharded_shape(parameter.shape, tensor_size), config)
        parameter.copy_(split.shard(unsharded, tensor_rank, tensor_size))


def _megatron_split_dim(parameter: torch.nn.Parameter) -> int | None:
    is_split = getattr(parameter, "tensor_model_parallel", False)
    return parameter.partition_dim if is_split else None  # type: ignore[attr-defined]
