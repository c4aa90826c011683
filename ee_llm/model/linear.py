"""megatron-core's linear layers, with plain products where no communication is needed."""

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.model.deferred_gradients import WeightGradients

distributed.enable_megatron()
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

Product = tuple[Tensor, Tensor | None]


class ColumnLinear(ColumnParallelLinear):
    """A linear layer sharded by outputs; without tensor parallelism, a plain torch product.

    megatron-core's layer uses Python autograd functions for communication and fused kernels even
    where there are none, which costs 1.5 % of a training step on a CPU
    (docs/reference/benchmarks.md).
    """

    weight_gradients: WeightGradients | None = None
    """Set by schedules that defer weight gradients."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Product:
        """Return the output, and the bias if it was not added; `weight` overrides `self.weight`."""
        parallel = self.config.tensor_model_parallel_size > 1
        if self.weight_gradients is None and parallel:
            return super().forward(input_, weight, runtime_gather_output)
        if self.config.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_)
        elif parallel:
            input_ = copy_to_tensor_model_parallel_region(input_)
        weight = self.weight if weight is None else weight
        bias = None if self.skip_bias_add else self.bias
        output = _product(self.weight_gradients, input_, weight, bias)
        return output, self.bias if self.skip_bias_add else None


class RowLinear(RowParallelLinear):
    """A linear layer sharded by inputs; without tensor parallelism, a plain torch product."""

    weight_gradients: WeightGradients | None = None
    """Set by schedules that defer weight gradients."""

    def forward(self, input_: Tensor) -> Product:
        """Return the output, and the bias for the caller to add."""
        assert self.skip_bias_add, "RowLinear requires skip_bias_add: the caller adds the bias"
        parallel = self.config.tensor_model_parallel_size > 1
        if self.weight_gradients is None and parallel:
            return super().forward(input_)
        output = _product(self.weight_gradients, input_, self.weight, None)
        if self.config.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output)
        elif parallel:
            output = reduce_from_tensor_model_parallel_region(output)
        return output, self.bias


def _product(
    gradients: WeightGradients | None, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if gradients is None:
        return torch.nn.functional.linear(hidden, weight, bias)
    output = gradients.linear(hidden, weight)
    return output if bias is None else output + bias
