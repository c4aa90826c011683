"""The pipeline's actions of one step with their times, as `ee-llm plan --trace` predicts them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from rich.markup import escape

from ee_llm import distributed
from ee_llm.atomic_file import replace_text
from ee_llm.data import Microbatch
from ee_llm.pipeline.planner.trace import chrome_trace
from ee_llm.pipeline.simulate import Span
from ee_llm.training.parallel import ParallelModel


def traced_step(
    model: ParallelModel, microbatches: Sequence[Microbatch], step: int, path: Path
) -> dict[int, float]:
    """Return what `forward_backward` does, and write its trace to `path` from global rank 0.

    Of the pipeline that global rank 0 is in; exits are slices of their own where they are deferred.
    Ranks measure by their own clocks, which start at a
    barrier, so that they agree to about a millisecond. The device is waited for around every
    action: a traced step is slower than others. Collective over all ranks.
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
            distributed.log(f"step {step + 1} is traced in {escape(str(path))}")
        except OSError as error:  # no reason to end a run
            distributed.log(f"[yellow]{escape(str(path))} cannot be written: {error.strerror}[/]")
    return losses


def _exit_part(span: Span) -> tuple[float, float] | None:
    return (span.start, span.start + span.exits) if span.exits else None
