"""Run the stages of a model one after another on one sequence, unsharded or sharded."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from ee_llm.config import Config
from ee_llm.inference.execution.attention import BlockTable, Run
from ee_llm.inference.execution.layers import Shard
from ee_llm.inference.execution.stage import ModelStage, partition_layers
from tests.unit.inference.models import random_tokens

TOKENS = random_tokens(21, seed=5)
CHUNKS = ((0, 21), (0, 1, 2, 13, 14, 21))  # the whole prompt; single rows; long and short runs
BLOCKS = (7, 3, 4, 5, 11, 2)  # with four positions each


def block_table() -> BlockTable:
    table = BlockTable(1, len(BLOCKS), 4, torch.device("cpu"))
    for index, block in enumerate(BLOCKS):
        table.set(0, index, block)
    return table


def stage_logits(
    config: Config,
    tensors: dict[str, Tensor],
    edges: tuple[int, ...] = CHUNKS[1],
    num_stages: int = 1,
    shard: Shard | None = None,
) -> dict[int, Tensor]:
    """Return {boundary: logits [s, v / n]} of TOKENS, processed in chunks between `edges`."""
    stages = [
        ModelStage(config, tensors, 48, layer_ranges, shard)
        for layer_ranges in partition_layers(config, num_stages)
    ]
    table = block_table()
    parts = {b: [] for b in (*config.exits.boundaries, config.model.num_layers)}
    for start, stop in pairwise(edges):
        rows = [Run(0, start, stop, 0)]
        batch = table.batch(rows, None, stages[0].cache_dtype)
        x = stages[0].embed(TOKENS[start:stop], batch.positions)
        for stage in stages:
            for index, layer_range in enumerate(stage.layer_ranges):
                hidden = stage.run(index, x, batch)
                x = hidden.x
                if layer_range.has_exit:
                    live = table.batch(rows, rows, stage.cache_dtype)
                    block = live if stage.has_block(index) else None
                    parts[layer_range.last].append(stage.logits(index, hidden, rows, block))
    return {boundary: torch.cat(logits) for boundary, logits in parts.items()}


class Ranks:
    """Threads that act as the ranks of a tensor-parallel group."""

    def __init__(self, size: int) -> None:
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self._all = threading.Barrier(size, timeout=60)

    def shard(self, rank: int) -> Shard:
        def reduce(partial: Tensor) -> Tensor:
            self._parts[rank] = partial.clone()
            self._all.wait()
            total = torch.stack(self._parts).sum(dim=0)
            self._all.wait()
            return total

        return Shard(rank, len(self._parts), reduce)

    def run(self, work: Callable[[Shard], dict[int, Tensor]]) -> list[dict[int, Tensor]]:
        def of_rank(rank: int) -> dict[int, Tensor]:
            try:
                return work(self.shard(rank))
            except Exception:
                self._all.abort()  # The other ranks must not wait.
                raise

        with ThreadPoolExecutor(len(self._parts)) as pool:
            return list(pool.map(of_rank, range(len(self._parts))))
