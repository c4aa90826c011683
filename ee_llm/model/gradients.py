"""Reduction of the gradients of a distributed model over ranks."""

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config
from ee_llm.model.stage import stages_with_weight

distributed.enable_megatron()
from megatron.core.distributed import DistributedDataParallel


class GradientReducer:
    """Sums the gradients of a step over ranks, in a fixed order.

    1. Weights shared by several stages: over those stages (as if they were untied and then
       all-reduced: EE-LLM, Prop. 3.1). Likewise the norms of all exits, if these share one.
    2. Parameters that are replicated on tensor ranks but whose gradient on a rank covers only some
       positions (sequence parallel) or heads (norms of queries and keys): over tensor ranks.
    3. All parameters: over data-parallel ranks, by megatron-core, as sums, because losses are
       already normalized.
    """

    def __init__(self, config: Config, grid: distributed.Grid) -> None:
        """Create the process groups of shared weights, in the same order on every rank."""
        self.grid = grid
        self.groups: dict[str, dist.ProcessGroup | None] = {}
        self.shares_norm = config.exits.norm == "shared"
        norms = 1 if config.model.family == "llama" else 2  # LayerNorm also has a bias
        self.norm_size = norms * config.model.hidden_size
        if config.is_tuning:
            return  # The shared weights are frozen.
        for name in ("embedding.word.weight", "output.weight"):
            stages = stages_with_weight(config, name)
            if len(stages) > 1:
                ranks = sorted({stage % grid.pipeline_size for stage in stages})
                self.groups[name] = grid.column_group(tuple(ranks))

    def __call__(self, chunks: list[DistributedDataParallel]) -> None:
        """Reduce the gradients (`main_grad`) of all parameters of this rank's stages."""
        for name, group in self.groups.items():
            if group is not None:
                self._sum_copies(chunks, name, group)
        if self.shares_norm:
            self._sum_norms(chunks)
        self._sum_tensor_parallel(chunks)
        if self.grid.data_size > 1:
            for chunk in chunks:
                chunk.finish_grad_sync()

    def _sum_copies(
        self, chunks: list[DistributedDataParallel], name: str, group: dist.ProcessGroup
    ) -> None:
        copies = [
            chunk.module.get_parameter(name).main_grad
            for chunk in chunks
            if name in chunk.module.copies
        ]
        for other in copies[1:]:
            copies[0].add_(other)
        dist.all_reduce(copies[0], group=group)
        for other in copies[1:]:
            other.copy_(copies[0])

    def _sum_norms(self, chunks: list[DistributedDataParallel]) -> None:
        """Give the norm of every exit the sum of the gradients of all, so that they stay equal."""
        norms = [exit_.norm for chunk in chunks for exit_ in chunk.module.exits.values()]
        gradients = [[p.main_grad for p in norm.parameters()] for norm in norms]
        buffer = chunks[0].buffers[0].grad_data
        total = torch.zeros(self.norm_size, dtype=buffer.dtype, device=buffer.device)
        for parts in gradients:
            total += torch.cat([part.flatten() for part in parts])
        if self.grid.pipeline_size > 1:
            dist.all_reduce(total, group=self.grid.pipeline_group)
        for parts in gradients:
            for part, summed in zip(parts, total.chunk(len(parts)), strict=True):
                part.copy_(summed)

    def _sum_tensor_parallel(self, chunks: list[DistributedDataParallel]) -> None:
        grads = [
            parameter.main_grad
            for chunk in chunks
            for name, parameter in chunk.module.named_parameters()
            if parameter.requires_grad and _has_partial_gradient(name, parameter)
        ]
        if not grads or self.grid.tensor_size == 1:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=self.grid.tensor_group)
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad))


def _has_partial_gradient(name: str, parameter: torch.nn.Parameter) -> bool:
    if ".q_layernorm." in name or ".k_layernorm." in name:
        return True
    return getattr(parameter, "sequence_parallel", False)
