"""The accelerator of this process: CUDA with NCCL where there is one, else the CPU with gloo."""

import ctypes
import os
import random
import resource
import sys

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The precisions to compute in, by the names that options give them."""


def fast_dtype() -> torch.dtype:
    """Return the precision that this rank's device decodes fastest in: bfloat16 or float32.

    bfloat16 on a GPU, and on a CPU that has instructions for its products.
    """
    has_products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_cuda() or has_products else torch.float32


def dtype_named(name: str) -> torch.dtype:
    """Return the precision that an option names: one of `DTYPES`, or "auto", the fast one."""
    return fast_dtype() if name == "auto" else DTYPES[name]


def local_rank() -> int:
    """Return this process's index on its machine (torchrun's LOCAL_RANK, 0 without a launcher)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_cuda() -> bool:
    """Return whether the ranks compute on CUDA: only if each on this machine has a GPU."""
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.cuda.is_available() and torch.cuda.device_count() >= num_local_ranks


def num_gpus() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device() -> torch.device:
    """Return the device this rank computes on: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend that belongs to `device()`: "nccl" or "gloo"."""
    return "nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has finished all queued work, so that a clock read next is true."""
    if has_cuda():
        torch.cuda.synchronize()


def synchronize_stream() -> None:
    """Wait for what was queued on the current stream, not for messages of other streams."""
    if has_cuda():
        torch.cuda.current_stream().synchronize()


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees on the CPU, for the next tensor of that size.

    glibc hands large blocks back to the system; every training step then gets its activations as
    new pages that the kernel clears one by one. Does nothing with another C library.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # bytes; the most that glibc takes
        mallopt(trim_threshold, 2**31 - 1)


def peak_memory_bytes() -> int:
    """Return this rank's peak memory so far in bytes: allocated on the GPU, resident on the CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux reports KiB


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on the CPU and this rank's GPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds every CUDA generator too


def rng_state() -> dict[str, torch.Tensor]:
    """Return torch's generator states of this rank as byte tensors, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned; a state of a device that is not here is left out."""
    torch.set_rng_state(states["cpu"].cpu())
    if has_cuda() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())


def peak_flops(dtype: torch.dtype) -> float | None:
    """Return the device's dense peak in FLOP/s for `dtype`, or None where it is not known.

    Source: NVIDIA's data sheets (without sparsity).
    """
    if not has_cuda() or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name()
    table = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
    return next((flops for key, flops in table.items() if key in name), None)
