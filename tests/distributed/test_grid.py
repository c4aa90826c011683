"""The grid of ranks, and megatron-core on a CPU."""

import time

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from tests.distributed.harness import RankFailed, run_ranks


def _grid(tensor, pipeline):
    grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=20)
    total = torch.tensor([float(grid.rank)])
    dist.all_reduce(total, group=grid.pipeline_group)
    return grid.tensor_rank, grid.pipeline_rank, grid.data_rank, grid.pipeline_ranks, total.item()


def test_layout_is_tensor_then_data_then_pipeline():
    assert run_ranks(4, _grid, 2, 2) == [
        (0, 0, 0, [0, 2], 2.0),
        (1, 0, 0, [1, 3], 4.0),
        (0, 1, 0, [0, 2], 2.0),
        (1, 1, 0, [1, 3], 4.0),
    ]
    assert [place[2] for place in run_ranks(4, _grid, 1, 2)] == [0, 1, 0, 1]


def test_starting_four_ranks_imports_nothing_again():
    run_ranks(1, _grid, 1, 1)  # imports
    start = time.monotonic()
    run_ranks(4, _grid, 2, 2)
    assert time.monotonic() - start < 10  # far above the expected time


def test_world_size_must_match_the_layout():
    with pytest.raises(RankFailed, match=r"world size 2 .* --nproc 4"):
        run_ranks(2, _grid, 2, 2)


def _lost_peer():
    grid = distributed.initialize(tensor=1, pipeline=2, timeout_s=1)
    if grid.rank == 0:
        time.sleep(4)
        return "slept"
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return "no error"


def _lost_in_column():
    grid = distributed.initialize(tensor=1, pipeline=2, timeout_s=1)
    group = grid.column_group((0, 1))
    if grid.rank == 0:
        time.sleep(3)
        return "slept"
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_groups_created_later_have_the_same_timeout():
    _, message = run_ranks(2, _lost_in_column)
    assert "imed out" in message or "timeout" in message.lower()


def test_collective_without_its_peer_times_out():
    _, message = run_ranks(2, _lost_peer)
    assert "imed out" in message or "timeout" in message.lower()
