"""What the leader of a pipeline hears, or no longer hears, of the other stages."""

import threading

import pytest
import torch
import torch.distributed as dist

from ee_llm.distributed.inference_grid import InferenceGrid


def make_leader() -> InferenceGrid:
    group = object()
    return InferenceGrid(0, 1, 0, 2, 1.0, group, group, [0, 1], group, group, {1: group})


@pytest.mark.parametrize("has_left", [False, True])
def test_a_listener_ends_silently_when_its_leader_has_left(monkeypatch, has_left) -> None:
    """An interrupted leader ends the groups while its listeners may be between two messages."""
    leader, errors = make_leader(), []

    def forgotten(tensor: torch.Tensor, peer: int, group: object) -> None:
        leader._has_left = has_left
        raise ValueError("Group is not registered")

    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(dist, "recv", forgotten)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    leader.listen()
    leader.await_farewells()
    assert len(errors) == (0 if has_left else 1)
