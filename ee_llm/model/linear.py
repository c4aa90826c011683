"""megatron-core's linear layers, without their detours where a rank has nobody to talk to."""

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
    """A linear layer split by outputs; without tensor parallelism, torch's own product.

    megatron-core's goes through autograd functions in Python for communication and fused kernels
    that are not there: 1.5 % of a training step on a CPU (docs/reference/benchmarks.md). `later`
    puts the weight's gradient off, where a schedule wants that.
    """

    later: WeightGradients | None = None

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Product:
        """Return the output and, where it is not added, the bias; `weight` replaces its own."""
        parallel = self.config.tensor_model_parallel_size > 1
        if self.later is None and parallel:
            return super().forward(input_, weight, runtime_gather_output)
        if self.config.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_)
        elif parallel:
            input_ = copy_to_tensor_model_parallel_region(input_)
        weight = self.weight if weight is None else weight
        bias = None if self.skip_bias_add else self.bias
        output = _product(self.later, input_, weight, bias)
        return output, self.bias if self.skip_bias_add else None


class RowLinear(RowParallelLinear):
    """A linear layer split by inputs; without tensor parallelism, torch's own product."""

    later: WeightGradients | None = None

    def forward(self, input_: Tensor) -> Product:
        """Return the output and the bias, which the caller adds."""
        assert self.skip_bias_add, "megatron-core's layers leave the bias to their caller"
        parallel = self.config.tensor_model_parallel_size > 1
        if self.later is None and parallel:
            return super().forward(input_)
        output = _product(self.later, input_, self.weight, None)
        if self.config.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output)
        elif parallel:
            output = reduce_from_tensor_model_parallel_region(output)
        return output, self.bias


def _product(
    later: WeightGradients | None, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if later is None:
        return torch.nn.functional.linear(hidden, weight, bias)
    output = later.linear(hidden, weight)
    return output if bias is None else output + bias
