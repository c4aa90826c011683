"""Ranks that end together: what one of them meets, all of them hear of, and soon."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.distributed.point_to_point import TransportError
from ee_llm.errors import RunError, UserError

Result = TypeVar("Result")
_CLOSED = ("closed by peer", "reset by peer", "broken pipe")  # in the messages of CPU backends


class LostContactError(RunError):
    """Another rank is gone or does not answer; that rank's own message says why."""


def fail_together(step: Callable[[], Result]) -> Result:
    """Return this rank's result of `step`, or raise on every rank if it failed on any.

    `step` must not communicate. A rank whose step failed raises its own error, the others a
    ValueError that quotes the first rank that failed. Collective over all ranks.
    """
    result, failures = _run(step)
    for rank, text in failures:
        raise UserError(f"rank {rank}: {text}")
    return result[0]


def from_first(step: Callable[[], Result]) -> Result:
    """Return on every rank what `step` returned on rank 0, the only one to run it.

    Raises on every rank if it failed, ValueError on the others. Collective over all ranks.
    """
    result, failures = _run(lambda: step() if dist.get_rank() == 0 else None)
    for _, text in failures:
        raise UserError(text)
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def _run(step: Callable[[], Result]) -> tuple[list[Result], list[tuple[int, str]]]:
    """Return the result in a list, and what ranks raised; raises where `step` did."""
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(step())
    except Exception as caught:
        error = caught
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if error is None else _text(error))
    if error is not None:
        raise error
    return result, [(rank, text) for rank, text in enumerate(told) if text is not None]


def largest(*numbers: int) -> list[int]:
    """Return the largest of all ranks' values of each number; one reduction over all ranks."""
    reduced = torch.tensor(numbers, device=distributed.device())
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced.tolist()


def is_lost_contact(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is that another rank is gone or silent."""
    signs = (*_CLOSED, "timed out", "socket timeout")
    while error is not None:
        if isinstance(error, TransportError | dist.DistError):
            return True
        # Backends on a CPU raise a plain RuntimeError.
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__
    return False


@contextmanager
def during(what: str) -> Iterator[None]:
    """Add what the run was doing to an error that may mean that another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(what)
        raise


def lost_contact(
    error: RuntimeError, grid: distributed.Grid, patience_s: float
) -> LostContactError:
    """Return the error that names the ranks which do not answer, and what this one waited for.

    Leaves the process groups, so that other ranks notice. Ranks that lost contact as well say so
    to each other for `patience_s` seconds. That lets the message of a rank that died come first.
    """
    store = dist.distributed_c10d._get_default_store()
    distributed.shutdown()
    absent = _absent_ranks(store, grid, time.monotonic() + patience_s)
    ranks = ("rank " if len(absent) == 1 else "ranks ") + " and ".join(map(str, absent))
    doing = " and ".join(getattr(error, "__notes__", ["the start"])[:1])
    text = str(error).lower()
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if "timed out" in text or "no answer within" in text:
        reason = f"no answer within {grid.timeout.total_seconds():g} s (parallel.timeout_s)"
    elif any(sign in text for sign in _CLOSED):
        reason = "the connection was closed"
    whom = ranks if absent else "another rank"
    return LostContactError(
        f"rank {grid.rank} lost contact with {whom} during {doing}: {reason}. Its own output says "
        "why, if it could say anything."
    )


def _absent_ranks(store: dist.Store, grid: distributed.Grid, deadline: float) -> list[int]:
    """Return the ranks that do not say before `deadline` that they have lost contact too."""
    keys = {rank: f"ee_llm lost contact {rank}" for rank in range(grid.world_size)}
    absent = list(keys)
    try:
        store.set(keys[grid.rank], "")
        while absent and time.monotonic() < deadline:
            absent = [rank for rank in absent if not store.check([keys[rank]])]
            time.sleep(0.1)
    except RuntimeError:  # the store is lost too
        return []
    return absent


def _text(error: Exception) -> str:
    # The message of a ValueError is meant for people as it is.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
