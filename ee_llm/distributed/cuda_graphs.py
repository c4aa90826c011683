"""Record work in CUDA graphs, if there is a GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ee_llm.distributed.devices import has_cuda

# In their first calls libraries select algorithms and allocate, which must not be recorded.
_WARM_UPS = 3


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Return a function that repeats `work` with one launch of a CUDA graph, or `work` on a CPU.

    `work` runs a few times during the recording. It must read and write the same tensors each time,
    and no shape or branch in it may depend on their values. Memory that it allocates is reused only
    when nothing refers to it any more.
    """
    if not has_cuda():
        return work
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            work()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        work()
    return graph.replay


@cache
def _pool() -> Any:
    """Return the memory pool that all graphs of this process share."""
    return torch.cuda.graph_pool_handle()
