"""The threads that receive the results of the other stages, on the leader."""

import threading

import pytest
import torch
import torch.distributed as dist

from ee_llm.distributed.inference_grid import InferenceGrid


def make_leader() -> InferenceGrid:
    group = object()
    return InferenceGrid(0, 1, 0, 2, 1.0, group, group, [0, 1], group, group, {1: group})


@pytest.mark.parametrize("is_shut_down", [False, True])
def test_listener_ends_silently_after_shutdown(monkeypatch, is_shut_down) -> None:
    """An interrupted leader destroys its groups while a listener may be between two messages."""
    leader, errors = make_leader(), []

    def receive(tensor: torch.Tensor, peer: int, group: object) -> dist.Work:
        leader._is_shut_down = is_shut_down
        raise ValueError("Group is not registered")

    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(dist, "irecv", receive)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    leader.listen()
    leader.join_listeners()
    assert len(errors) == (0 if is_shut_down else 1)
