"""The runtime with real ranks and messages: gradients, lifetimes, lost peers."""

import time

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.distributed.point_to_point import Transport, connect
from ee_llm.pipeline import Action, Plan, Visit, forward_only, lower, one_f_one_b
from ee_llm.pipeline.runtime import Runtime
from ee_llm.pipeline.schedules.bubble_filling import cooldown_visits, filled_1f1b, warmup_visits
from ee_llm.pipeline.schedules.interleaved import interleaved
from ee_llm.pipeline.schedules.zero_bubble import zero_bubble_h1
from tests.distributed.harness import run_ranks
from tests.unit.pipeline.toy import SPEC, Shape, assert_same_gradients, reference, stages_of

SHAPES = {
    1: [Shape(("imo",)), Shape(("o",))],
    2: [
        Shape(("o", "io")),
        Shape(("", "o")),
        Shape(("mo", "mo")),
        Shape(("o", "i"), frozenset({0, 1})),
    ],
    3: [Shape(("o", "iom", "o")), Shape(("", "", "o")), Shape(("", "ii", "o"), frozenset({1}))],
    4: [
        Shape(("mo", "io", "i", "o")),
        Shape(("", "oo", "", "o")),
        Shape(("m", "", "i", "o"), frozenset({0, 2, 3})),
        Shape(("o", "", "", "")),
        Shape(("o", "o", "io", "o"), dead=frozenset({1, 2})),
    ],
}


def _join(stages, timeout_s=30.0):
    grid = distributed.initialize(tensor=1, pipeline=stages, timeout_s=timeout_s)
    return grid, connect(grid)


def _run(grid, transport, plan, shape, deferred=True):
    rank = grid.pipeline_rank
    stages = stages_of(shape, plan, rank)
    Runtime(lower(plan), rank, stages, transport, SPEC, deferred).step()
    return stages


def _gradients(stages):
    return {name: g for stage in stages.values() for name, g in stage.gradients().items()}


def _parity(size):
    grid, transport = _join(size)
    checked = 0
    for shape in SHAPES[size]:
        for microbatches in (1, 2, 3, 8):
            plan = one_f_one_b(size, microbatches)
            expected = reference(shape, plan)
            for deferred in (True, False):
                stages = _run(grid, transport, plan, shape, deferred)
                assert_same_gradients(_gradients(stages), expected)
                (stage,) = stages.values()
                exits = len(stage.kinds)
                ahead = min(size - stage.stage, microbatches)
                assert stage.live.total == exits * microbatches
                if not stage.dead:
                    assert stage.live.peak == (min(1, exits) if deferred else exits * ahead)
                assert not stage.live.alive
                checked += 1
    return checked


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_equal_the_single_process_and_exit_graphs_are_bounded(size):
    """1F1B over `size` ranks, also with fewer microbatches than ranks, in float64 to 1e-12.

    The number of live exit graphs on stage i is one with deferral, else those of P-i microbatches.
    """
    assert run_ranks(size, _parity, size) == [8 * len(SHAPES[size])] * size


def _parse(*lines):
    return tuple(tuple(Action.parse(text) for text in line.split()) for line in lines)


TWO_STAGES_EACH = Plan(
    _parse(
        "0F0 0F1 2F0 2F1 2B0 0B0 2B1 0B1",
        "1F0 1F1 3F0 3B0 1B0 3F1 3B1 1B1",
    ),
    (0, 1, 0, 1),
    (Visit(4, 0),) * 2,
)
NEIGHBOURS_SHARE_A_RANK = Plan(
    _parse(
        "0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1",
        "2F0 3F0 3B0 2B0 2F1 3F1 3B1 2B1",
    ),
    (0, 0, 1, 1),
    (Visit(4, 0),) * 2,
)
SHORT_VISITS = Plan(
    _parse(
        "0F0 0F1 0F2 0B1 0B0",
        "1F0 1F1 1B1 1F2 1B0",
        "2F0 2F2 2B0 2B2",
        "3F0 3B0 3F2 3B2",
    ),
    (0, 1, 2, 3),
    (Visit(4, 0), Visit(2, 0), Visit(4, 2)),
)


def _plan_parity(size, plan, rounds):
    grid, transport = _join(size)
    exits = ("mo", "io", "i", "o", "", "m", "i", "o")[-plan.num_stages :]
    shape = Shape(exits, split_exits=plan.splits_exits)
    expected = reference(shape, plan)
    for _ in range(rounds):
        assert_same_gradients(_gradients(_run(grid, transport, plan, shape)), expected)


@pytest.mark.parametrize(
    ("size", "plan"),
    [
        (2, TWO_STAGES_EACH),
        (2, NEIGHBOURS_SHARE_A_RANK),
        (4, SHORT_VISITS),
        (2, interleaved(2, 2, 6)),
        (2, interleaved(2, 4, 4)),
        (4, interleaved(4, 2, 8)),
        (2, zero_bubble_h1(2, 5)),
        (4, zero_bubble_h1(4, 6)),
        (4, zero_bubble_h1(4, 6, split_exits=True)),
        (4, filled_1f1b(4, 4, warmup_visits(4, 2, 0.5, [0, 1]), cooldown_visits(4, 2, 0.5))),
    ],
    ids=[
        "two stages each",
        "neighbours share a rank",
        "short visits",
        "interleaved, 2 ranks",
        "interleaved, 4 stages each",
        "interleaved, 4 ranks",
        "zero bubble, 2 ranks",
        "zero bubble, 4 ranks",
        "zero bubble of exits too",
        "filled",
    ],
)
def test_other_plans_run_with_the_same_runtime(size, plan):
    """Messages in both directions between two peers must not be swapped in any step."""
    run_ranks(size, _plan_parity, size, plan, 5)


def _evaluation():
    grid, transport = _join(3)
    stages = _run(grid, transport, forward_only(3, 5), Shape(("o", "im", "o")))
    (stage,) = stages.values()
    assert stage.grad_modes == [False] * 5
    assert all(gradient is None for gradient in _gradients(stages).values())
    return stage.live.total


def test_forward_only_computes_every_exit_and_no_gradient():
    assert run_ranks(3, _evaluation) == [5, 10, 5]


def _two_columns():
    """Train two columns separately; messages must stay in their column."""
    grid, transport = _join(2)
    shape = [Shape(("o", "o")), Shape(("mm", "io"))][grid.data_rank]
    plan = one_f_one_b(2, 3 + grid.data_rank)
    assert_same_gradients(_gradients(_run(grid, transport, plan, shape)), reference(shape, plan))


def test_columns_are_separate():
    run_ranks(4, _two_columns)


def _lost(silent, patience):
    """Return the errors of the ranks if rank `silent` does not participate."""
    grid = distributed.initialize(tensor=1, pipeline=2, timeout_s=30.0)
    transport = Transport((0, 1), dist.group.WORLD, dist.new_group(), timeout_s=1.0)
    if grid.rank == silent:
        time.sleep(patience)
        return "slept"
    start = time.monotonic()
    try:
        _run(grid, transport, one_f_one_b(2, 1), Shape(("o", "o")))
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "no error"


def test_error_names_peer_channel_and_place_of_a_silent_peer():
    (message, seconds), _ = run_ranks(2, _lost, 1, 3.0)
    assert "pipeline rank 0 failed at 0B0" in message
    assert (
        "backward message with tag 1 did not arrive from pipeline rank 1 (global rank 1)" in message
    )
    assert "no response within 1 s (parallel.timeout_s)" in message
    assert ">0B0<" in message
    assert 0.9 < seconds < 2.9
    _, (message, seconds) = run_ranks(2, _lost, 0, 3.0)
    assert "pipeline rank 1 failed at 1F0" in message
    assert (
        "forward message with tag 0 did not arrive from pipeline rank 0 (global rank 0)" in message
    )
    assert 0.9 < seconds < 2.9


def _dead():
    grid, transport = _join(2, timeout_s=20)
    if grid.rank == 1:
        dist.destroy_process_group()
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"did not arrive from pipeline rank 1 .*(?i:clos)"):
        _run(grid, transport, one_f_one_b(2, 1), Shape(("o", "o")))
    return time.monotonic() - start


def test_exited_peer_is_noticed_at_once():
    seconds, _ = run_ranks(2, _dead)
    assert seconds < 10


def _unread():
    grid, transport = _join(2, timeout_s=1.0)
    if grid.rank == 1:
        time.sleep(3)
        return None
    for tag in range(6):  # exceeds max_in_flight
        try:
            transport.send(torch.zeros(1 << 20), peer=1, channel="forward", tag=tag)
        except RuntimeError as error:
            return tag, str(error)
    return "no error"


def test_number_of_unreceived_sends_is_limited():
    """gloo keeps every sent tensor alive until the peer has received it."""
    (tag, message), _ = run_ranks(2, _unread)
    assert tag == 4
    assert "forward message with tag 0 was not received by pipeline rank 1" in message


def _tags():
    """Receive messages in another order than they were sent in, also non-contiguous ones."""
    grid, transport = _join(2)
    if grid.rank == 0:
        source = torch.arange(12.0).reshape(3, 4)
        for tag in range(3):
            transport.send(source.T + tag, peer=1, channel="forward", tag=tag)
        transport.send(source, peer=1, channel="backward", tag=0)
        transport.flush()
        return None
    transport.post_receive(torch.empty(3, 4), peer=0, channel="backward", tag=0)
    buffers = [torch.empty(4, 3) for _ in range(3)]
    for tag in (2, 0, 1):
        transport.post_receive(buffers[tag], peer=0, channel="forward", tag=tag)
    returned = transport.wait_receive(peer=0, channel="backward", tag=0)
    taken = [transport.wait_receive(peer=0, channel="forward", tag=tag) for tag in (1, 2, 0)]
    assert returned[1, 0] == 4
    assert [tensor[1, 0].item() for tensor in taken] == [2.0, 3.0, 1.0]
    return True


def test_messages_are_matched_by_channel_and_tag():
    assert run_ranks(2, _tags) == [None, True]
