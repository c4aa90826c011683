"""What DeepSpeed's optimizers hold, as whole tensors under the names of our checkpoints.

Parts are gathered and set by DeepSpeed's own functions for it (deepspeed.utils, `safe_*`).
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
# Where DeepSpeed's optimizers keep this rank's part of the float32 parameters, group by group.
_PARTS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 in bfloat16
)


class ZeroOptimizer:
    """The optimizer of a `ZeroModel` that was started; `checkpoint.whole.WholeTensors`."""

    def __init__(self, model: ZeroModel) -> None:
        """Make room for the moments, which DeepSpeed would not have before the first step."""
        self.model = model
        self._zero = distributed.deepspeed().utils
        self._optimizer: Any = model.engine.optimizer
        self._parameters = {
            canonical_name(name): parameter
            for name, parameter in model.stages[0].named_parameters()
            if parameter.requires_grad
        }
        adam = self._optimizer.optimizer
        [parts] = [
            getattr(self._optimizer, name) for name in _PARTS if hasattr(self._optimizer, name)
        ]
        for part in parts:
            adam.initialize_state(part)
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()
        self.steps = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of parameters, whose learning rates are set in them."""
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
        """Return the trained parameters, their masters unless they are float32, and moments."""
        specs: dict[str, TensorSpec] = {}
        for name, parameter in self._parameters.items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            specs[name] = TensorSpec(shape, parameter.dtype)
            prefixes = [*MOMENTS.values(), *[MASTER] * (parameter.dtype != torch.float32)]
            specs |= {prefix + name: TensorSpec(shape, torch.float32) for prefix in prefixes}
        return specs

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU. Collective."""
        parameter, key = self._found(name)
        if key is not None:
            return self._zero.safe_get_full_optimizer_state(parameter, key).cpu()
        master = self._zero.safe_get_full_fp32_param(parameter)
        return (master if name.startswith(MASTER) else master.to(parameter.dtype)).cpu()

    def set_tensor(self, name: str, whole: Tensor) -> None:
        """Take this rank's part of a moment or a master."""
        parameter, key = self._found(name)
        assert name not in self._parameters, f"{name} has its value since before `start`"
        whole = whole.to(parameter.device)
        if not hasattr(parameter, "ds_id"):
            if key is None:
                self._zero.safe_set_full_fp32_param(parameter, whole)
            else:
                self._zero.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # Stage 3: the last rank's part is padded to the length of the others.
        length = parameter.partition_numel()
        first = self.model.grid.data_rank * length
        part = torch.zeros(length, dtype=whole.dtype, device=whole.device)
        values = whole.flatten()[first : first + length]
        part[: len(values)] = values
        if key is None:
            self._zero.safe_set_local_fp32_param(parameter, part)
        else:
            self._zero.safe_set_local_optimizer_state(parameter, part, key)

    def _found(self, name: str) -> tuple[Any, str | None]:
        """Return the parameter that a tensor is of, and which moment it is, if it is one."""
        for key, prefix in MOMENTS.items():
            if name.startswith(prefix):
                return self._parameters[name.removeprefix(prefix)], key
        return self._parameters[name.removeprefix(MASTER)], None
