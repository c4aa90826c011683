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
    """A message that did not arrive in time or whose peer is gone."""


class _Pending(NamedTuple):
    work: dist.Work
    tensor: torch.Tensor  # must live until the message is through
    tag: int


class Transport:
    """Sends and receives tensors by (peer, channel, tag), nothing of it blocking but the waits.

    Peers are numbered along the column: 0 holds the first stage. The channels are separate
    process groups, hence separate NCCL communicators, so that what travels forward never queues
    behind what travels backward. On gloo a message is matched by its tag. NCCL has no tags:
    there, both peers must post the messages of a channel in the same order, which
    `pipeline.lower` proves.

    Every message is posted by itself: batched operations to one peer may be matched in another
    order than they were posted in.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        forward_group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup,
        timeout_s: float,
        max_in_flight: int = 4,
    ) -> None:
        """Join the column of the given global ranks.

        timeout_s bounds every wait. max_in_flight bounds the sent tensors per peer and channel
        that are kept because the peer has not taken them yet; a further send waits for the oldest.
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
        """Post a message; the tensor must not change until the message is through."""
        queue = self._sends[peer, channel]
        # gloo only learns that a send is over by waiting for it, so this frees CUDA's alone.
        while queue and queue[0].work.is_completed():
            queue.popleft()
        while len(queue) >= self._max_in_flight:
            self._wait(queue.popleft(), peer, channel, "was not taken by")
        tensor = tensor.contiguous()
        try:
            work = dist.isend(tensor, self._ranks[peer], self._groups[channel], tag)
        except RuntimeError as error:
            raise self._lost(peer, channel, tag, "could not be sent to", error) from error
        assert work is not None, "this rank is not in its own column's group"
        queue.append(_Pending(work, tensor, tag))

    def post(self, buffer: torch.Tensor, *, peer: int, channel: Channel, tag: int) -> None:
        """Post a receive into `buffer`, to be collected by `take`."""
        try:
            work = dist.irecv(buffer, self._ranks[peer], self._groups[channel], tag)
        except RuntimeError as error:
            raise self._lost(peer, channel, tag, "cannot come from", error) from error
        assert work is not None, "this rank is not in its own column's group"
        self._receives[peer, channel, tag].append(_Pending(work, buffer, tag))

    def take(self, *, peer: int, channel: Channel, tag: int) -> torch.Tensor:
        """Return the buffer of the oldest posted receive of this tag, filled.

        Raises TransportError after timeout_s seconds, or when the peer is gone.
        """
        queue = self._receives.get((peer, channel, tag))
        assert queue, f"no receive of tag {tag} from peer {peer} was posted ({channel})"
        pending = queue.popleft()
        if not queue:
            del self._receives[peer, channel, tag]
        self._wait(pending, peer, channel, "did not come from")
        return pending.tensor

    def flush(self) -> None:
        """Wait until all sent messages are through; TransportError as for `take`."""
        for (peer, channel), queue in self._sends.items():
            while queue:
                self._wait(queue.popleft(), peer, channel, "was not taken by")

    def _wait(self, pending: _Pending, peer: int, channel: Channel, what: str) -> None:
        try:
            if pending.tensor.is_cuda:
                # Orders the current stream behind the message without stopping the host. NCCL's
                # watchdog enforces the group's time-out.
                pending.work.wait()
            else:
                pending.work.wait(datetime.timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise self._lost(peer, channel, pending.tag, what, error) from error

    def _lost(
        self, peer: int, channel: Channel, tag: int, what: str, error: RuntimeError
    ) -> TransportError:
        reason = str(error).strip()
        if "timed out" in reason.lower():
            reason = f"no answer within {self._timeout_s:g} s (parallel.timeout_s)"
        return TransportError(
            f"{channel} message with tag {tag} {what} pipeline rank {peer} "
            f"(global rank {self._ranks[peer]}): {reason}; look at that rank's own output first"
        )


def connect(grid: Grid) -> Transport:
    """Return the transport of this rank's pipeline column, every wait bounded by the grid's time.

    Every rank of the world must call this at the same point: process groups are made together.
    """
    column = tuple(range(grid.pipeline_size))
    forward, backward = grid.column_group(column), grid.column_group(column)
    assert forward is not None, f"rank {grid.rank} stands in no pipeline column"
    assert backward is not None, f"rank {grid.rank} stands in no pipeline column"
    return Transport(grid.pipeline_ranks, forward, backward, grid.timeout.total_seconds())
