"""Runs a benchmark's function in several ranks that are forked from this process."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(*args)` returned in each of `world_size` ranks on this machine.

    Every rank sees torchrun's environment and must join the process group before it returns. This
    process must not have computed with several threads before: threads do not survive a fork.

    Raises ValueError where there is a GPU: CUDA does not survive a fork either.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "its ranks are forked and compute on the CPU: hide the GPUs from it, "
            "CUDA_VISIBLE_DEVICES= python ..."
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(world_size, mp_context=get_context("fork")) as pool:
        # A rank waits for all others to join, so that no process takes two of them.
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
