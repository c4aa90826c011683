"""Choose the dtype to train in: on a CPU, the faster one of bfloat16 and float32."""

import time

import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config

_TIME_LIMIT_S = 2.0  # after which no further measurement starts
_MAX_ROWS = 2048  # more rows take longer but do not change the ratio


def choose_dtype(config: Config) -> str:
    """Return the name of the dtype in `training.dtype`, or the fastest one for "auto".

    Rank 0 measures, so that all ranks use the same dtype. Collective over all ranks.
    """
    if config.training.dtype != "auto":
        return config.training.dtype
    if distributed.has_cuda():
        return "bfloat16"
    rows = min(_MAX_ROWS, config.training.micro_batch_size * config.data.seq_length)
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        seconds = {
            name: _seconds(
                distributed.DTYPES[name],
                rows,
                config.model.hidden_size,
                config.model.ffn_hidden_size,
            )
            for name in ("float32", "bfloat16")
        }
        chosen[0] = min(seconds, key=lambda name: seconds[name])
    dist.broadcast_object_list(chosen, src=0)
    assert chosen[0] is not None
    return chosen[0]


def _seconds(dtype: torch.dtype, rows: int, width: int, inner: int) -> float:
    """Return the time of a linear layer's three products: output, input and weight gradient."""
    # Random numbers would advance the generator of this rank only, so that its dropout would differ
    # from that of the other tensor ranks.
    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + _TIME_LIMIT_S
    for _ in range(5):
        start = time.perf_counter()
        y = x @ weight.t()
        y @ weight
        y.t() @ x
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    return best
