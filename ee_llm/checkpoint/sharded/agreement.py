"""Failing together: a step that fails on one rank fails on all, so that none waits for another."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ee_llm.errors import CheckpointError

Result = TypeVar("Result")


def together(what: str, step: Callable[[], Result]) -> list[Result]:
    """Return every rank's result of `step`, or raise on all ranks if it failed on any.

    `step` must not communicate, unless all ranks leave its collectives alike. A rank that died
    ends the wait by the process group's time-out. Raises CheckpointError: the rank's own
    where it was one, else one that names the ranks and what they raised.
    """
    outcome: tuple[Exception | None, Any] = (None, None)
    try:
        outcome = (None, step())
    except Exception as error:
        outcome = (error, None)
    own = outcome[0]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own and _describe(own), outcome[1]))
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(everyone) if text]
    if isinstance(own, CheckpointError):
        raise own
    if failures:
        # Ranks often meet the same obstacle: say each thing once.
        texts = {text for text, _ in everyone if text}
        shown = texts if len(texts) == 1 else failures[:4]
        raise CheckpointError(f"{what}: {'; '.join(shown)}") from own
    return [result for _, result in everyone]


def on_first(what: str, step: Callable[[], Result]) -> Result:
    """Return on all ranks what `step` returned on rank 0, the only one to run it.

    Raises CheckpointError on all ranks if it failed.
    """

    def run() -> Result | None:
        return step() if dist.get_rank() == 0 else None

    return together(what, run)[0]  # type: ignore[return-value]


def _describe(error: Exception) -> str:
    # The message of a ValueError is meant for people as it is.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
