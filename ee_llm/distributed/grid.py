"""Process groups of the grid of tensor, pipeline and data ranks."""

import datetime
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ee_llm.distributed import devices, environment, megatron
from ee_llm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """The position of this rank in the grid, and its process groups.

    Ranks are ordered as in Megatron-LM: tensor ranks are adjacent, then data, then pipeline ranks.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    timeout: datetime.timedelta
    """Time after which a collective fails, also in groups that are created later."""

    @property
    def pipeline_ranks(self) -> list[int]:
        """Return the global ranks of this pipeline column, first stage first."""
        return dist.get_process_group_ranks(self.pipeline_group)

    def column_group(self, stages: tuple[int, ...]) -> dist.ProcessGroup | None:
        """Create a group of the given stages of every column and return this rank's.

        Returns None if this rank is on none of the stages. Collective: every rank of the world must
        call this with the same stages.
        """
        own_group = None
        stride = self.world_size // self.pipeline_size
        for first in range(stride):
            ranks = [first + stage * stride for stage in stages]
            group = dist.new_group(ranks, timeout=self.timeout)
            if self.rank in ranks:
                own_group = group
        return own_group


def initialize(
    *, tensor: int = 1, pipeline: int = 1, timeout_s: float = 600, seed: int = 0
) -> Grid:
    """Create the process groups of a tensor x pipeline x data layout and return this rank's grid.

    Reads torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Without it the world
    is this one process.

    Args:
        tensor: Number of tensor-parallel ranks.
        pipeline: Number of pipeline ranks. The remaining factor of the world size is data-parallel.
        timeout_s: Seconds after which a collective fails instead of waiting forever.
        seed: Seed of the random generators. They are equal on tensor ranks outside of
            tensor-parallel regions, and different on pipeline and data ranks.

    Raises:
        UserError: The environment is invalid, or the world size is not a multiple of
            tensor x pipeline, or this process already uses torch.distributed.
    """
    environment.refuse_second_group()
    launched = environment.launched_world_size()
    world_size = launched or 1
    if world_size % (tensor * pipeline):
        raise UserError(
            f"world size {world_size} is not a multiple of parallel.tensor {tensor} x "
            f"parallel.pipeline {pipeline} = {tensor * pipeline} ranks. Launch with --nproc "
            f"{tensor * pipeline}, or change the layout."
        )
    megatron.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = datetime.timedelta(seconds=timeout_s)
    if devices.has_cuda():
        torch.cuda.set_device(devices.device())
    elif torch.cuda.is_available():
        logger.warning(
            "this machine has more ranks than its %d GPUs, so all ranks compute on the CPU. Start "
            "one rank per GPU to use the GPUs.",
            torch.cuda.device_count(),
        )
    if not devices.has_cuda():
        devices.keep_freed_memory()
    if launched:
        dist.init_process_group(devices.backend(), timeout=timeout)
    else:
        dist.init_process_group(
            devices.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    parallel_state.initialize_model_parallel(
        tensor, pipeline, distributed_timeout_minutes=timeout_s / 60
    )
    grid = _current_grid(parallel_state, timeout)
    # Dropout must differ between pipeline and data ranks. megatron-core's tracker makes the
    # tensor-parallel regions differ between tensor ranks.
    model_seed = seed + 100 * grid.pipeline_rank + 100_000 * grid.data_rank
    devices.seed_everything(model_seed)
    model_parallel_cuda_manual_seed(model_seed)
    return grid


def _current_grid(parallel_state: Any, timeout: datetime.timedelta) -> Grid:
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    places: dict[str, int] = {}
    for axis, group in groups.items():
        places[f"{axis}_rank"] = dist.get_rank(group)
        places[f"{axis}_size"] = dist.get_world_size(group)
    return Grid(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_group=groups["tensor"],
        pipeline_group=groups["pipeline"],
        data_group=groups["data"],
        timeout=timeout,
        **places,
    )


def shutdown() -> None:
    """Destroy all process groups, if there are any."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
