"""The device of this process: CUDA with NCCL if every rank has a GPU, else the CPU with gloo."""

import ctypes
import os
import random
import resource
import sys

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""The dtypes to compute in, by their names in options."""


def fast_dtype() -> torch.dtype:
    """Return the dtype that this rank's device decodes fastest in.

    This is bfloat16 on a GPU and on a CPU with bfloat16 matrix instructions, else float32.
    """
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_cuda() or has_instructions else torch.float32


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype with this name in `DTYPES`, or `fast_dtype()` for "auto"."""
    return fast_dtype() if name == "auto" else DTYPES[name]


def local_rank() -> int:
    """Return the index of this process on its machine: torchrun's LOCAL_RANK, or 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # missing on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_cuda() -> bool:
    """Return whether the ranks compute on CUDA: every rank on this machine must have a GPU."""
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.cuda.is_available() and torch.cuda.device_count() >= num_local_ranks


def num_gpus() -> int:
    """Return the number of GPUs that are visible to this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device() -> torch.device:
    """Return the device that this rank computes on: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if has_cuda() else torch.device("cpu")


def is_device_in_use(name: str | None) -> bool:
    """Return whether `name` means `device()`.

    None and the names of the first GPU do on every machine, because programs that offer a choice of
    devices give them by default.
    """
    in_use = device()
    return name in (None, "cuda", "cuda:0", in_use.type, str(in_use))


def backend() -> str:
    """Return the torch.distributed backend for `device()`: "nccl" or "gloo"."""
    return "nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has finished all queued work, as before reading a clock."""
    if has_cuda():
        torch.cuda.synchronize()


def synchronize_stream() -> None:
    """Wait for the work on the current stream, but not for messages on other streams."""
    if has_cuda():
        torch.cuda.current_stream().synchronize()


def keep_freed_memory() -> None:
    """Make malloc keep freed CPU memory for the next tensor of the same size.

    By default glibc returns large blocks to the system, so that every training step gets its
    activations as new pages, which the kernel clears one by one. Does nothing with another C
    library.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # bytes; the largest value that glibc accepts
        mallopt(trim_threshold, 2**31 - 1)


def peak_memory_bytes() -> int:
    """Return this rank's peak memory in bytes: allocated on the GPU, or resident on the CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux reports KiB


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, and torch on the CPU and on this rank's GPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds every CUDA generator too


def rng_state() -> dict[str, torch.Tensor]:
    """Return the states of torch's generators on this rank as byte tensors, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Restore the states from `rng_state`; ignore the state of a device that is missing here."""
    torch.set_rng_state(states["cpu"].cpu())
    if has_cuda() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())


def peak_flops(dtype: torch.dtype) -> float | None:
    """Return the device's dense peak in FLOP/s for `dtype`, or None if it is not known.

    Source: NVIDIA's data sheets (without sparsity).
    """
    if not has_cuda() or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name()
    table = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
    return next((flops for key, flops in table.items() if key in name), None)
