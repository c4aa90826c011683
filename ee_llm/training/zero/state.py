"""The state of DeepSpeed's optimizers as unsharded tensors, under their names in checkpoints.

DeepSpeed's own functions gather and set the shards (deepspeed.utils, `safe_*`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.checkpoint.read import MASTER
from ee_llm.checkpoint.write import TensorSpec
from ee_llm.model.initialize import canonical_name
from ee_llm.training.zero.model import ZeroModel

MOMENTS = {
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
# Attributes of DeepSpeed's optimizers with this rank's shard of the float32 parameters, by group.
_SHARDS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 in bfloat16
)


class ZeroOptimizer:
    """The optimizer of a started `ZeroModel`, which implements `UnshardedTensors`."""

    def __init__(self, model: ZeroModel) -> None:
        """Allocate the moments, which DeepSpeed would allocate in the first step."""
        self.model = model
        self._zero = distributed.deepspeed().utils
        self._optimizer: Any = model.engine.optimizer
        self._parameters = {
            canonical_name(name): parameter
            for name, parameter in model.stages[0].named_parameters()
            if parameter.requires_grad
        }
        adam = self._optimizer.optimizer
        [shards] = [
            getattr(self._optimizer, name) for name in _SHARDS if hasattr(self._optimizer, name)
        ]
        for shard in shards:
            adam.initialize_state(shard)
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()
        self.steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, which carry the learning rates."""
        return self._optimizer.param_groups

    @property
    def steps(self) -> int:
        """Number of updates so far."""
        return max(group["step"] for group in self.param_groups)

    @steps.setter
    def steps(self, steps: int) -> None:
        for group in self.param_groups:
            group["step"] = steps

    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the specs of trained parameters, moments, and master weights if not in float32."""
        specs: dict[str, TensorSpec] = {}
        for name, parameter in self._parameters.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            specs[name] = TensorSpec(shape, parameter.dtype)
            prefixes = [*MOMENTS.values(), *[MASTER] * (parameter.dtype != torch.float32)]
            specs |= {prefix + name: TensorSpec(shape, torch.float32) for prefix in prefixes}
        return specs

    def tensor(self, name: str) -> Tensor:
        """Return an unsharded tensor on the CPU. Collective."""
        parameter, key = self._parameter(name)
        if key is not None:
            return self._zero.safe_get_full_optimizer_state(parameter, key).cpu()
        master = self._zero.safe_get_full_fp32_param(parameter)
        return (master if name.startswith(MASTER) else master.to(parameter.dtype)).cpu()

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Set this rank's shard of a moment or a master weight from the unsharded tensor."""
        parameter, key = self._parameter(name)
        assert name not in self._parameters, f"{name} is set before `start`"
        tensor = tensor.to(parameter.device)
        if not hasattr(parameter, "ds_id"):
            if key is None:
                self._zero.safe_set_full_fp32_param(parameter, tensor)
            else:
                self._zero.safe_set_full_optimizer_state(parameter, tensor, key)
            return
        # Stage 3: the shard of the last rank is padded to the length of the others.
        length = parameter.partition_numel()
        first = self.model.grid.data_rank * length
        shard = torch.zeros(length, dtype=tensor.dtype, device=tensor.device)
        values = tensor.flatten()[first : first + length]
        shard[: len(values)] = values
        if key is None:
            self._zero.safe_set_local_fp32_param(parameter, shard)
        else:
            self._zero.safe_set_local_optimizer_state(parameter, shard, key)

    def _parameter(self, name: str) -> tuple[Any, str | None]:
        """Return the parameter of a tensor, and the key of the moment if the tensor is one."""
        for key, prefix in MOMENTS.items():
            if name.startswith(prefix):
                return self._parameters[name.removeprefix(prefix)], key
        return self._parameters[name.removeprefix(MASTER)], None
