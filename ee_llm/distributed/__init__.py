"""Devices, process groups and communication.

The only package that names cuda, nccl and gloo. It selects the device and the backend, builds the
grid of ranks, sends tensors between pipeline ranks and makes megatron-core run on a CPU.
"""

from ee_llm.distributed.console import console, is_rank_zero, print_line, progress_bar
from ee_llm.distributed.cuda_graphs import record
from ee_llm.distributed.deepspeed import deepspeed
from ee_llm.distributed.devices import (
    DTYPES,
    backend,
    device,
    dtype_named,
    fast_dtype,
    has_cuda,
    is_device_in_use,
    local_rank,
    num_cores,
    peak_flops,
    peak_memory_bytes,
    rng_state,
    seed_everything,
    set_rng_state,
    synchronize,
    synchronize_stream,
)
from ee_llm.distributed.environment import launched_world_size, refuse_second_group
from ee_llm.distributed.grid import Grid, initialize, shutdown
from ee_llm.distributed.inference_grid import InferenceGrid, RankLostError, check_gpus
from ee_llm.distributed.inference_grid import connect as connect_serving
from ee_llm.distributed.megatron import enable as enable_megatron

__all__ = [
    "DTYPES",
    "Grid",
    "InferenceGrid",
    "RankLostError",
    "backend",
    "check_gpus",
    "connect_serving",
    "console",
    "deepspeed",
    "device",
    "dtype_named",
    "enable_megatron",
    "fast_dtype",
    "has_cuda",
    "initialize",
    "is_device_in_use",
    "is_rank_zero",
    "launched_world_size",
    "local_rank",
    "num_cores",
    "peak_flops",
    "peak_memory_bytes",
    "print_line",
    "progress_bar",
    "record",
    "refuse_second_group",
    "rng_state",
    "seed_everything",
    "set_rng_state",
    "shutdown",
    "synchronize",
    "synchronize_stream",
]
