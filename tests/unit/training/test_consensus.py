"""Sharing results and errors among ranks, and recognizing lost ranks."""

import pytest
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.distributed.point_to_point import TransportError
from ee_llm.training.consensus import (
    fail_together,
    is_lost_contact,
    max_over_ranks,
    run_on_rank_zero,
)
from tests.distributed.harness import run_ranks


def _rank():
    distributed.initialize(timeout_s=20)
    return dist.get_rank()


def _fail_on(failing, error):
    rank = _rank()

    def step():
        if rank in failing:
            raise error
        return rank

    try:
        return fail_together(step)
    except (ValueError, OSError) as found:
        return type(found).__name__, str(found)


def test_each_rank_gets_its_own_result():
    assert run_ranks(2, _fail_on, (), None) == [0, 1]


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_error_of_one_rank_is_raised_on_all(failing):
    for rank, found in enumerate(run_ranks(2, _fail_on, failing, ValueError("bad"))):
        said = "bad" if rank in failing else f"rank {failing[0]}: bad"
        assert found == ("ValueError" if rank in failing else "UserError", said)


def test_message_of_an_unexpected_error_names_its_type():
    ends = run_ranks(2, _fail_on, (1,), FileNotFoundError(2, "No such file", "x"))
    assert ends[0] == ("UserError", "rank 1: FileNotFoundError: [Errno 2] No such file: 'x'")
    assert ends[1][0] == "FileNotFoundError"


def _run_on_rank_zero(fails):
    rank = _rank()

    def step():
        if fails:
            raise ValueError("bad")
        return f"of rank {rank}"

    try:
        return run_on_rank_zero(step)
    except ValueError as error:
        return str(error)


def test_all_ranks_get_the_result_of_rank_zero():
    assert run_ranks(2, _run_on_rank_zero, False) == ["of rank 0"] * 2
    assert run_ranks(2, _run_on_rank_zero, True) == ["bad"] * 2


def _max_over_ranks():
    rank = _rank()
    return max_over_ranks(rank, 7 - rank, 0)


def test_max_over_ranks():
    assert run_ranks(2, _max_over_ranks) == [[1, 7, 0]] * 2


def _peer_exits():
    if _rank() == 1:
        distributed.shutdown()
        return None
    try:
        dist.barrier()
    except RuntimeError as error:
        return str(error), is_lost_contact(error)
    return "no error", False


def test_exit_of_a_peer_is_recognized():
    """The message is the backend's, and may differ in another version of torch."""
    message, is_lost = run_ranks(2, _peer_exits)[0]
    assert is_lost, message


def _failed_because_of(cause):
    try:
        raise RuntimeError("failed at 2F0") from cause
    except RuntimeError as error:
        return error


def test_causes_are_searched():
    assert is_lost_contact(_failed_because_of(TransportError("gone")))
    assert not is_lost_contact(_failed_because_of(ValueError("the shapes differ")))
    assert not is_lost_contact(ValueError("the run timed out"))
    assert not is_lost_contact(None)
