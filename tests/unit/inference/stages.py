"""The lean stages of a model run one after the other, whole or in shards, on one sequence."""

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
CHUNKS = ((0, 21), (0, 1, 2, 13, 14, 21))  # the prompt at once; single rows, long and short runs
BLOCKS = (7, 3, 4, 5, 11, 2)  # of four positions


def page_table() -> BlockTable:
    pages = BlockTable(1, len(BLOCKS), 4, torch.device("cpu"))
    for index, block in enumerate(BLOCKS):
        pages.set(0, index, block)
    return pages


def stage_logits(
    config: Config,
    tensors: dict[str, Tensor],
    edges: tuple[int, ...] = CHUNKS[1],
    num_stages: int = 1,
    shard: Shard | None = None,
) -> dict[int, Tensor]:
    """Return {boundary: logits [s, v / t]} of TOKENS, which come in chunks between `edges`."""
    stages = [
        ModelStage(config, tensors, 48, pieces, shard)
        for pieces in partition_layers(config, num_stages)
    ]
    pages, parts = (
        page_table(),
        {b: [] for b in (*config.exits.boundaries, config.model.num_layers)},
    )
    for start, stop in pairwise(edges):
        rows = [Run(0, start, stop, 0)]
        batch = pages.batch(rows, None, stages[0].cache_dtype)
        x = stages[0].embed(TOKENS[start:stop], batch.positions)
        for stage in stages:
            for index, piece in enumerate(stage.pieces):
                x, attended = stage.run(index, x, batch)
                if piece.has_exit:
                    within = pages.batch(rows, rows, stage.cache_dtype)
                    block = within if stage.has_block(index) else None
                    parts[piece.last].append(stage.logits(index, x, attended, rows, block))
    return {boundary: torch.cat(found) for boundary, found in parts.items()}


class Ranks:
    """Threads that sum as the ranks of a tensor-parallel group do."""

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
                self._all.abort()  # the others need not wait
                raise

        with ThreadPoolExecutor(len(self._parts)) as pool:
            return list(pool.map(of_rank, range(len(self._parts))))
