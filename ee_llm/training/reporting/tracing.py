"""Trace the pipeline's actions of one step, in the format of `ee-llm plan --trace`."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from ee_llm.atomic_file import replace_text
from ee_llm.data import Microbatch
from ee_llm.pipeline.planner.trace import chrome_trace
from ee_llm.pipeline.simulate import Span
from ee_llm.training.parallel import ParallelModel

logger = logging.getLogger(__name__)


def traced_step(
    model: ParallelModel, microbatches: Sequence[Microbatch], step: int, path: Path
) -> dict[int, float]:
    """Run `forward_backward` and write a trace of it to `path` from global rank 0.

    The trace shows the pipeline of global rank 0. Deferred exits are separate slices. Every rank
    has its own clock, which starts at a barrier, so that the clocks agree to about a millisecond.
    A traced step is slower than others, because the device is synchronized around every action.
    Collective over all ranks.

    Returns:
        The losses that `forward_backward` returns.
    """
    spans: list[Span] = []
    losses = model.forward_backward(microbatches, step, spans)
    ranks: list[list[Span]] = [[] for _ in range(model.grid.pipeline_size)]
    dist.all_gather_object(ranks, spans, group=model.grid.pipeline_group)
    if model.grid.rank == 0:
        filling = range(model.num_microbatches, len(microbatches))
        try:
            trace = chrome_trace(ranks, filling=filling, exit_part=_exit_part)
            replace_text(path, json.dumps(trace))
            logger.info("the trace of step %d is in %s", step + 1, path)
        except OSError as error:  # must not end the run
            logger.warning("%s cannot be written: %s", path, error.strerror)
    return losses


def _exit_part(span: Span) -> tuple[float, float] | None:
    return (span.start, span.start + span.exits) if span.exits else None
