"""Point-to-point messages between the ranks of one pipeline column."""

import datetime
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from ee_llm.distributed.grid import Grid
from ee_llm.errors import RunError

Channel = Literal["forward", "backward"]


class TransportError(RunError):
    """A message did not arrive in time, or its peer is gone."""


class _Pending(NamedTuple):
    work: dist.Work
    tensor: torch.Tensor  # must live until the message completes
    tag: int


class Transport:
    """Sends and receives tensors by (peer, channel, tag) without blocking, except in waits.

    Peers are numbered along the column: peer 0 has the first stage. The channels are separate
    process groups, hence separate NCCL communicators, so that forward messages never queue behind
    backward ones. gloo matches messages by tag. NCCL has no tags, so both peers must post the
    messages of a channel in the same order, which `pipeline.lower` proves.

    Every message is posted separately, because batched operations to one peer may be matched in
    another order than they were posted in.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        forward_group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup,
        timeout_s: float,
        max_in_flight: int = 4,
    ) -> None:
        """Connect the column of the given ranks.

        Args:
            ranks: Global ranks of the column, by peer number.
            forward_group: Process group of the forward channel.
            backward_group: Process group of the backward channel.
            timeout_s: Limit of every wait, in seconds.
            max_in_flight: Limit of incomplete sends per peer and channel. A further send waits for
                the oldest.
        """
        self._ranks = tuple(ranks)
        self._groups: dict[Channel, dist.ProcessGroup] = {
            "forward": forward_group,
            "backward": backward_group,
        }
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._sends: dict[tuple[int, Channel], deque[_Pending]] = defaultdict(deque)
        self._receives: dict[tuple[int, Channel, int], deque[_Pending]] = defaultdict(deque)

    def send(self, tensor: torch.Tensor, *, peer: int, channel: Channel, tag: int) -> None:
        """Post a send. The tensor must not change until the message completes."""
        queue = self._sends[peer, channel]
        # This frees only CUDA tensors: gloo notices that a send is complete only by waiting for it.
        while queue and queue[0].work.is_completed():
            queue.popleft()
        while len(queue) >= self._max_in_flight:
            self._wait(queue.popleft(), peer, channel, "was not received by")
        tensor = tensor.contiguous()
        try:
            work = dist.isend(tensor, self._ranks[peer], self._groups[channel], tag)
        except RuntimeError as error:
            raise self._lost(peer, channel, tag, "could not be sent to", error) from error
        assert work is not None, "this rank is not in its own column's group"
        queue.append(_Pending(work, tensor, tag))

    def post_receive(self, buffer: torch.Tensor, *, peer: int, channel: Channel, tag: int) -> None:
        """Post a receive into `buffer`, to be completed by `wait_receive`."""
        try:
            work = dist.irecv(buffer, self._ranks[peer], self._groups[channel], tag)
        except RuntimeError as error:
            raise self._lost(peer, channel, tag, "cannot be received from", error) from error
        assert work is not None, "this rank is not in its own column's group"
        self._receives[peer, channel, tag].append(_Pending(work, buffer, tag))

    def wait_receive(self, *, peer: int, channel: Channel, tag: int) -> torch.Tensor:
        """Wait for the oldest posted receive of this tag and return its buffer.

        Raises:
            TransportError: `timeout_s` seconds have passed, or the peer is gone.
        """
        queue = self._receives.get((peer, channel, tag))
        assert queue, f"no receive of tag {tag} from peer {peer} was posted ({channel})"
        pending = queue.popleft()
        if not queue:
            del self._receives[peer, channel, tag]
        self._wait(pending, peer, channel, "did not arrive from")
        return pending.tensor

    def flush(self) -> None:
        """Wait until all sends are complete. Raises TransportError like `wait_receive`."""
        for (peer, channel), queue in self._sends.items():
            while queue:
                self._wait(queue.popleft(), peer, channel, "was not received by")

    def _wait(self, pending: _Pending, peer: int, channel: Channel, failure: str) -> None:
        try:
            if pending.tensor.is_cuda:
                # Makes the current stream wait for the message without blocking the host. NCCL's
                # watchdog enforces the group's timeout.
                pending.work.wait()
            else:
                pending.work.wait(datetime.timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise self._lost(peer, channel, pending.tag, failure, error) from error

    def _lost(
        self, peer: int, channel: Channel, tag: int, failure: str, error: RuntimeError
    ) -> TransportError:
        reason = str(error).strip().rstrip(".")
        if "timed out" in reason.lower():
            reason = f"no response within {self._timeout_s:g} s (parallel.timeout_s)"
        return TransportError(
            f"{channel} message with tag {tag} {failure} pipeline rank {peer} "
            f"(global rank {self._ranks[peer]}): {reason}. Look at the output of that rank first."
        )


def connect(grid: Grid) -> Transport:
    """Return the transport of this rank's pipeline column, with the grid's timeout.

    Collective: every rank of the world must call this at the same point, because it creates process
    groups.
    """
    column = tuple(range(grid.pipeline_size))
    forward, backward = grid.column_group(column), grid.column_group(column)
    assert forward is not None, f"rank {grid.rank} is in no pipeline column"
    assert backward is not None, f"rank {grid.rank} is in no pipeline column"
    return Transport(grid.pipeline_ranks, forward, backward, grid.timeout.total_seconds())
