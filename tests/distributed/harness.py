"""Run a function in several ranks, which are forked after everything is imported once."""

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import active_children, connection, get_context
from typing import IO, Any, NamedTuple

from ee_llm import distributed

distributed.enable_megatron()
import megatron.core.parallel_state
import megatron.core.tensor_parallel  # noqa: F401  (so that the ranks do not import it)

gc.freeze()  # excludes the imported modules from the ranks' garbage collections, for speed


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time. The message has its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60
) -> list[Any]:
    """Run `function(*args)` in each of `world_size` forked ranks and return the results.

    Each rank has torchrun's environment (RANK, WORLD_SIZE, ...) and initializes its process groups
    itself. Results must be picklable. All ranks are killed at the end.

    Raises:
        RankFailed: A rank failed or did not finish in time. The message has the traceback of the
            first rank that failed, or those of the ranks that did not finish.
    """
    port = free_port()
    ranks = [_start((rank, world_size, port, function, args)) for rank in range(world_size)]
    try:
        return _collect(ranks, time.monotonic() + timeout_s)
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.place.close()


class _Rank(NamedTuple):
    process: Any
    answer: connection.Connection
    place: IO[str]
    """The file to which the rank writes its traceback on SIGUSR1."""


def _start(arguments: tuple[Any, ...]) -> _Rank:
    context = get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    place = tempfile.TemporaryFile("w+")  # noqa: SIM115  (run_ranks closes it)
    process = context.Process(target=_rank_main, args=(writer, place, *arguments), daemon=True)
    process.start()
    writer.close()
    return _Rank(process, reader, place)


def _collect(ranks: list[_Rank], deadline: float) -> list[Any]:
    numbers = {rank.answer: number for number, rank in enumerate(ranks)}
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [answer for answer, number in numbers.items() if number not in results]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(_unfinished([numbers[answer] for answer in waiting], ranks))
        for answer in ready:
            number = numbers[answer]  # type: ignore[index]
            try:
                ok, payload = pickle.loads(answer.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {number} died without a result") from None
            if not ok:
                raise RankFailed(f"rank {number} of {len(ranks)} failed:\n{payload}")
            results[number] = payload
    return [results[number] for number in range(len(ranks))]


def _unfinished(numbers: list[int], ranks: list[_Rank]) -> str:
    message = f"ranks {numbers} did not finish in time"
    for number in numbers:
        os.kill(ranks[number].process.pid, signal.SIGUSR1)
    time.sleep(1)
    for number in numbers:
        ranks[number].place.seek(0)
        message += f"\nrank {number} is here:\n{ranks[number].place.read()}"
    return message


def _rank_main(writer, place, rank, world_size, port, function, args) -> None:
    faulthandler.register(signal.SIGUSR1, file=place)
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
    for child in active_children():  # megatron-core's writer leaves a process
        child.kill()
    with contextlib.suppress(BrokenPipeError):
        writer.send_bytes(pickle.dumps(message))
        writer.close()
    if message[0]:
        distributed.shutdown()
    os._exit(0)  # skips the parent's atexit handlers (pytest, coverage)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
