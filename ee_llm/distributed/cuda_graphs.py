"""Work recorded once and launched as a whole: CUDA graphs, where there is a GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ee_llm.distributed.devices import has_cuda

# Libraries choose algorithms and allocate in their first calls, which may not be recorded.
_WARM_UPS = 3


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Return what does `work` again, by one launch of a CUDA graph; on a CPU, `work` itself.

    `work` runs a few times here. It must read and write the same tensors each time, and no shape or
    branch in it may depend on their values. What it allocates stays its own while it is referenced.
    """
    if not has_cuda():
        return work
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            work()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        work()
    return graph.replay


@cache
def _pool() -> Any:
    """Return the memory that all graphs of this process share."""
    return torch.cuda.graph_pool_handle()
