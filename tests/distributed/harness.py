"""Runs a function in several ranks: everything is imported once, then the ranks are forked."""

import contextlib
import gc
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from typing import Any

from ee_llm import platform

platform.enable_megatron()
import megatron.core.parallel_state
import megatron.core.tensor_parallel  # noqa: F401  (imported here, once, and not in each rank)

gc.freeze()  # what the parent has imported is no rank's garbage: their collections stay quick


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time; the message carries its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60
) -> list[Any]:
    """Return what `function(*args)` returned in each of `world_size` forked ranks.

    Each rank sees torchrun's environment (RANK, WORLD_SIZE, ...) and initialises its process
    groups itself. Results must be picklable. Raises RankFailed with the traceback of the first rank
    that failed; all other ranks are killed, so nothing is left behind.
    """
    context = get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(writer, rank, world_size, port, function, args), daemon=True
        )
        process.start()
        writer.close()
        pipes.append(reader)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[connection.Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(pipes))) - set(results))
            raise RankFailed(f"ranks {missing} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, payload = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} died without a result") from None
            if not ok:
                raise RankFailed(f"rank {rank} of {len(pipes)} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(writer, rank, world_size, port, function, args) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        writer.send_bytes(pickle.dumps(message))
        writer.close()
    if message[0]:
        platform.shutdown()
    os._exit(0)  # no atexit handlers of the parent's (pytest, coverage) run twice


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
