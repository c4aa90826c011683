"""Where the code runs: the one room that names cuda, nccl and gloo.

It chooses the device and backend, forms the grid of ranks, carries tensors between pipeline ranks
and makes megatron-core run on a CPU. Everything else asks here.
"""

from ee_llm.platform.console import console, is_rank_zero, log, progress_bar
from ee_llm.platform.devices import (
    DTYPES,
    backend,
    device,
    dtype_named,
    fast_dtype,
    has_cuda,
    local_rank,
    num_cores,
    num_gpus,
    peak_flops,
    peak_memory_bytes,
    rng_state,
    seed_everything,
    set_rng_state,
    synchronize,
    synchronize_stream,
)
from ee_llm.platform.environment import launched_world_size
from ee_llm.platform.graphs import record
from ee_llm.platform.grid import Grid, initialize, shutdown
from ee_llm.platform.megatron import enable as enable_megatron
from ee_llm.platform.serving import RankLostError, ServingGrid
from ee_llm.platform.serving import connect as connect_serving
from ee_llm.platform.zero import deepspeed

__all__ = [
    "DTYPES",
    "Grid",
    "RankLostError",
    "ServingGrid",
    "backend",
    "connect_serving",
    "console",
    "deepspeed",
    "device",
    "dtype_named",
    "enable_megatron",
    "fast_dtype",
    "has_cuda",
    "initialize",
    "is_rank_zero",
    "launched_world_size",
    "local_rank",
    "log",
    "num_cores",
    "num_gpus",
    "peak_flops",
    "peak_memory_bytes",
    "progress_bar",
    "record",
    "rng_state",
    "seed_everything",
    "set_rng_state",
    "shutdown",
    "synchronize",
    "synchronize_stream",
]
