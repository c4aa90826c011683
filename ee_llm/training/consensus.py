"""Propagate an error to all ranks so that they fail together, and name ranks that are lost."""

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
_CLOSED = ("closed by peer", "reset by peer", "broken pipe")  # messages of CPU backends


class LostContactError(RunError):
    """Another rank is gone or does not respond; that rank's own message says why."""


def fail_together(step: Callable[[], Result]) -> Result:
    """Run `step` on every rank and return its result, or raise on every rank if any rank failed.

    `step` must not communicate. A rank whose step failed raises its own error, the others raise a
    UserError that quotes the first rank that failed. Collective over all ranks.
    """
    result, failures = _run(step)
    for rank, text in failures:
        raise UserError(f"rank {rank}: {text}")
    return result[0]


def run_on_rank_zero(step: Callable[[], Result]) -> Result:
    """Run `step` on rank 0 only and return its result on every rank.

    If it fails, rank 0 raises its error and the others a UserError. Collective over all ranks.
    """
    result, failures = _run(lambda: step() if dist.get_rank() == 0 else None)
    for _, text in failures:
        raise UserError(text)
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def _run(step: Callable[[], Result]) -> tuple[list[Result], list[tuple[int, str]]]:
    """Return the result in a list, and (rank, message) of each failure; raise if `step` failed."""
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(step())
    except Exception as caught:
        error = caught
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if error is None else _text(error))
    if error is not None:
        raise error
    return result, [(rank, text) for rank, text in enumerate(messages) if text is not None]


def max_over_ranks(*numbers: int) -> list[int]:
    """Return the maximum of each number over all ranks. Collective: one reduction."""
    reduced = torch.tensor(numbers, device=distributed.device())
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced.tolist()


def is_lost_contact(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes means that another rank is gone or hangs."""
    signs = (*_CLOSED, "timed out", "socket timeout")
    while error is not None:
        if isinstance(error, TransportError | dist.DistError):
            return True
        # CPU backends raise a plain RuntimeError.
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__
    return False


@contextmanager
def during(activity: str) -> Iterator[None]:
    """Add `activity` as a note to a RuntimeError, for the message of `lost_contact`."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(activity)
        raise


def lost_contact(
    error: RuntimeError, grid: distributed.Grid, patience_s: float
) -> LostContactError:
    """Return an error that names the lost ranks and the activity that `during` recorded.

    Destroys the process groups, so that the other ranks notice. For `patience_s` seconds the ranks
    that lost contact report it to each other, so that each can tell which ranks are gone. The delay
    also lets the message of a rank that died come first.
    """
    store = dist.distributed_c10d._get_default_store()
    distributed.shutdown()
    absent = _absent_ranks(store, grid, time.monotonic() + patience_s)
    ranks = ("rank " if len(absent) == 1 else "ranks ") + " and ".join(map(str, absent))
    activity = " and ".join(getattr(error, "__notes__", ["the start"])[:1])
    text = str(error).lower()
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if "timed out" in text or "no response within" in text:
        reason = f"no response within {grid.timeout.total_seconds():g} s (parallel.timeout_s)"
    elif any(sign in text for sign in _CLOSED):
        reason = "the connection was closed"
    lost = ranks if absent else "another rank"
    return LostContactError(
        f"rank {grid.rank} lost contact with {lost} during {activity}: {reason}. Look at the "
        f"output of {lost} for the cause."
    )


def _absent_ranks(store: dist.Store, grid: distributed.Grid, deadline: float) -> list[int]:
    """Return the ranks that do not report before `deadline` that they lost contact too."""
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
    # The message of a ValueError is written for the user.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
