"""megatron-core's linear layers, without their detours where a rank has nobody to talk to."""

import torch

from ee_llm import platform

platform.enable_megatron()
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

Product = tuple[torch.Tensor, torch.Tensor | None]


class ColumnLinear(ColumnParallelLinear):
    """A linear layer split by outputs; without tensor parallelism, torch's own product.

    megatron-core's goes through autograd functions in Python for communication and fused kernels
    that are not there: 1.5 % of a training step on a CPU (docs/benchmarks.md).
    """

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Product:
        """Return the output and, where it is not added, the bias; `weight` replaces its own."""
        if self.config.tensor_model_parallel_size > 1:
            return super().forward(input_, weight, runtime_gather_output)
        return _whole(self, input_, self.weight if weight is None else weight)


class RowLinear(RowParallelLinear):
    """A linear layer split by inputs; without tensor parallelism, torch's own product."""

    def forward(self, input_: torch.Tensor) -> Product:
        """Return the output and, where it is not added, the bias."""
        if self.config.tensor_model_parallel_size > 1:
            return super().forward(input_)
        return _whole(self, input_, self.weight)


def _whole(layer: ColumnLinear | RowLinear, hidden: torch.Tensor, weight: torch.Tensor) -> Product:
    if layer.skip_bias_add:
        return torch.nn.functional.linear(hidden, weight), layer.bias
    return torch.nn.functional.linear(hidden, weight, layer.bias), None
