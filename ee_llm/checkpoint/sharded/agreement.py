"""Propagates errors to all ranks, so that they fail together and none waits for another."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ee_llm.errors import CheckpointError

Result = TypeVar("Result")


def fail_together(what: str, step: Callable[[], Result]) -> list[Result]:
    """Run `step` on every rank and return the results of all ranks.

    If the step fails on any rank, every rank raises CheckpointError: its own if it had one,
    otherwise one that starts with `what` and names the ranks and their errors. `step` must not
    communicate unless its collectives succeed or fail on all ranks alike. If a rank dies, the
    others wait until the process group's time-out.
    """
    outcome: tuple[Exception | None, Any] = (None, None)
    try:
        outcome = (None, step())
    except Exception as error:
        outcome = (error, None)
    own_error = outcome[0]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (own_error and _describe(own_error), outcome[1]))
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    if isinstance(own_error, CheckpointError):
        raise own_error
    if failures:
        # Ranks often fail for the same reason: show each reason once.
        texts = {text for text, _ in outcomes if text}
        shown = texts if len(texts) == 1 else failures[:4]
        raise CheckpointError(f"{what}: {'; '.join(shown)}") from own_error
    return [result for _, result in outcomes]


def run_on_rank_zero(what: str, step: Callable[[], Result]) -> Result:
    """Run `step` on rank 0 and return its result on all ranks.

    Raises CheckpointError on all ranks if the step fails.
    """

    def run() -> Result | None:
        return step() if dist.get_rank() == 0 else None

    return fail_together(what, run)[0]  # type: ignore[return-value]


def _describe(error: Exception) -> str:
    # The message of a ValueError is complete without the name of the exception.
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
