"""Run the function of a benchmark in several ranks that are forked from this process."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` in `world_size` ranks on this machine and return their results.

    Every rank has torchrun's environment variables and must join the process group before it
    returns. This process must not have used several threads before, because they do not survive a
    fork.

    Raises:
        ValueError: A GPU is visible. CUDA does not survive a fork.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "a GPU is visible, but this benchmark forks its ranks and runs on CPUs. To hide the"
            " GPUs, run: CUDA_VISIBLE_DEVICES= python ..."
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(world_size, mp_context=get_context("fork")) as pool:
        # Each rank waits until all have joined, so no worker process runs two of them.
        ranks = [
            pool.submit(_run, rank, world_size, port, function, args) for rank in range(world_size)
        ]
        return [rank.result() for rank in ranks]


def _run(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    return function(*args)
