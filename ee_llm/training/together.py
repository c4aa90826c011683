"""Ranks that end together: what one of them meets, all of them hear of, and soon."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ee_llm import platform
from ee_llm.platform.transport import TransportError

Result = TypeVar("Result")


class LostContactError(RuntimeError):
    """Another rank is gone or does not answer; that rank's own message says why."""


def fail_together(step: Callable[[], Result]) -> Result:
    """Return this rank's result of `step`, or raise on every rank if it failed on any.

    `step` must not communicate. A rank whose step failed raises its own error, the others a
    ValueError that quotes the first rank that failed. Collective over all ranks.
    """
    result, failures = _run(step)
    for rank, text in failures:
        raise ValueError(f"rank {rank}: {text}")
    return result[0]


def from_first(step: Callable[[], Result]) -> Result:
    """Return on every rank what `step` returned on rank 0, the only one to run it.

    Raises on every rank if it failed, ValueError on the others. Collective over all ranks.
    """
    result, failures = _run(lambda: step() if dist.get_rank() == 0 else None)
    for _, text in failures:
        raise ValueError(text)
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
    reduced = torch.tensor(numbers, device=platform.device())
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced.tolist()


def is_lost_contact(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is that another rank is gone or silent."""
    signs = ("closed by peer", "reset by peer", "broken pipe", "timed out", "socket timeout")
    while error is not None:
        if isinstance(error, TransportError | dist.DistError):
            return True
        # Backends on a CPU raise a plain RuntimeError.
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__
    return False


def _text(error: Exception) -> str:
    # The message of a ValueError is meant for people as it is.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
