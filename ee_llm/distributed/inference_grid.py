"""Process groups and messages of the ranks that decode one model together."""

import contextlib
import datetime
import io
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ee_llm.distributed import devices, environment
from ee_llm.errors import RunError, UserError

_MAX_IN_FLIGHT = 32  # tensors; a pass sends up to eight
_UNLIMITED = datetime.timedelta(days=10_000)  # gloo adds it to the time since the machine started


class RankLostError(RunError):
    """Another rank exited or did not respond in time."""


@dataclass
class InferenceGrid:
    """This rank's pipeline stage and tensor rank, and its communication with the other ranks.

    Rank 0 (stage 0, tensor rank 0) is the leader: it is the only rank that receives requests.
    Bytes travel over CPU groups, hidden states over groups of the device's backend. A wait within a
    pass ends after `timeout_s` seconds with a RankLostError. A rank waits for its next message
    without a limit, since the engine may be idle, but fails at once if the sender's process ends.
    """

    tensor_rank: int
    tensor_size: int
    stage: int
    num_stages: int
    timeout_s: float
    _tensor_group: dist.ProcessGroup
    _tensor_control: dist.ProcessGroup
    _column_ranks: list[int]
    _column_group: dist.ProcessGroup
    _column_control: dist.ProcessGroup
    _result_groups: dict[int, dist.ProcessGroup]
    _results: "queue.SimpleQueue[tuple[int, bytes] | Exception]" = field(
        default_factory=queue.SimpleQueue
    )
    describe_lost: Callable[[], str] | None = None
    """Returns a sentence about a lost rank, empty if none is known to have ended."""
    _sent: "deque[tuple[dist.Work, Tensor]]" = field(default_factory=deque)
    _listeners: list[threading.Thread] = field(default_factory=list)
    _is_shut_down: bool = False

    @property
    def is_leader(self) -> bool:
        """Return whether this rank receives the requests."""
        return self.stage == 0 and self.tensor_rank == 0

    def reduce(self, partial: Tensor) -> Tensor:
        """Return the sum of `partial` over the tensor-parallel ranks, bitwise equal on each."""
        self._try(lambda: dist.all_reduce(partial, group=self._tensor_group))
        return partial

    def gather(self, part: Tensor) -> Tensor:
        """Concatenate the parts [r, n] of all tensor-parallel ranks to [r, n * ranks]."""
        if self.tensor_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.tensor_size)]
        self._try(lambda: dist.all_gather(parts, part.contiguous(), group=self._tensor_group))
        return torch.cat(parts, dim=-1)

    def broadcast(self, message: bytes = b"") -> bytes:
        """Return the message of tensor rank 0 on every rank of its tensor-parallel group."""
        if self.tensor_size == 1:
            return message
        source, *others = dist.get_process_group_ranks(self._tensor_control)
        if self.tensor_rank > 0:
            return self._receive_message(source, self._tensor_control)
        for peer in others:
            self._send_message(message, peer, self._tensor_control)
        return message

    def send_next(self, message: bytes, hidden: Tensor) -> None:
        """Send a message and hidden states [t, h] to the next stage, without blocking."""
        peer = self._column_ranks[self.stage + 1]
        self._send(torch.tensor([len(message), len(hidden)]), peer, self._column_control)
        self._send(_bytes(message), peer, self._column_control)
        if len(hidden):
            self._send(hidden.contiguous(), peer, self._column_group)

    def receive_previous(self, hidden_size: int, dtype: torch.dtype) -> tuple[bytes, Tensor]:
        """Return the message and the hidden states [t, h] that the previous stage sent."""
        peer = self._column_ranks[self.stage - 1]
        sizes = self._receive_next(torch.empty(2, dtype=torch.int64), peer, self._column_control)
        message = torch.empty(int(sizes[0]), dtype=torch.uint8)
        message = self._receive(message, peer, self._column_control)
        hidden = torch.empty(int(sizes[1]), hidden_size, dtype=dtype, device=devices.device())
        if len(hidden):
            self._receive(hidden, peer, self._column_group)
        return message.numpy().tobytes(), hidden

    def broadcast_from_last(
        self, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """Return the tensor of the last stage on every stage with the same tensor rank.

        Other stages pass an empty tensor; `shape` and `dtype` are those of the last stage's.
        """
        if self.num_stages == 1:
            return tensor
        if self.stage < self.num_stages - 1:
            tensor = torch.empty(shape, dtype=dtype, device=devices.device())
        tensor, source = tensor.contiguous(), self._column_ranks[-1]
        self._try(lambda: dist.broadcast(tensor, source, group=self._column_group))
        return tensor

    def gather_to_leader(self, parts: dict[int, Any]) -> dict[int, Any]:
        """Return the parts of all stages on the leader, and nothing on the other ranks.

        Args:
            parts: Tensors, numbers, strings and collections of them, by keys that differ by stage.
        """
        if self.tensor_rank > 0:
            return {}
        if self.stage > 0:
            buffer = io.BytesIO()
            torch.save(parts, buffer)
            self.send_result(buffer.getvalue())
            self.flush()
            return {}
        found = dict(parts)
        for group in self._result_groups.values():
            peer = _sender(group)
            size = self._receive(torch.empty(1, dtype=torch.int64), peer, group)
            data = self._receive(torch.empty(int(size), dtype=torch.uint8), peer, group)
            message = io.BytesIO(data.numpy().tobytes())
            found |= torch.load(message, map_location="cpu", weights_only=True)
        return found

    def send_next_numbers(self, numbers: list[int]) -> None:
        """Send numbers, as many as the next stage expects, without blocking."""
        peer = self._column_ranks[self.stage + 1]
        self._send(torch.tensor(numbers, dtype=torch.int64), peer, self._column_control)

    def receive_previous_numbers(self, count: int) -> list[int]:
        """Return the `count` numbers that the previous stage sent."""
        peer = self._column_ranks[self.stage - 1]
        numbers = torch.empty(count, dtype=torch.int64)
        return self._receive(numbers, peer, self._column_control).tolist()

    def send_result(self, message: bytes) -> None:
        """Send a message to the leader, from tensor rank 0 of any stage after the first."""
        self._send_message(message, 0, self._result_groups[self.stage])

    def flush(self) -> None:
        """Wait at the end of a run until all sends are complete.

        A peer may exit after it receives the last message, so a lost rank is not an error here.
        """
        while self._sent:
            work, _ = self._sent.popleft()
            with contextlib.suppress(RuntimeError):
                work.wait()

    def listen(self) -> None:
        """Start the leader's threads that receive the results of each later stage."""
        for stage, group in self._result_groups.items():
            thread = threading.Thread(target=self._listen_to, args=(stage, group), daemon=True)
            thread.start()
            self._listeners.append(thread)

    def join_listeners(self) -> None:
        """Wait until every stage has announced its end with an empty result."""
        for thread in self._listeners:
            thread.join(self.timeout_s)

    def shutdown(self) -> None:
        """Destroy the process groups; ranks that still wait for this one fail at once."""
        if self._is_shut_down:
            return
        self._is_shut_down = True
        dist.destroy_process_group()
        # A connection closes only when the last reference to its group is gone.
        del self._tensor_group, self._tensor_control, self._column_group, self._column_control
        self._result_groups.clear()
        self._sent.clear()

    def next_result(self, wait: bool) -> tuple[int, bytes] | None:
        """Return the stage and the message of the next result.

        Without `wait`, return None if no result has arrived. With it, raise RankLostError if none
        arrives within `timeout_s` seconds.
        """
        try:
            result = self._results.get(wait, self.timeout_s if wait else None)
        except queue.Empty:
            if not wait:
                return None
            message = f"no stage sent a result within {self.timeout_s:g} s"
            raise RankLostError(self._lost() or message) from None
        if isinstance(result, Exception):
            raise result
        return result

    def _listen_to(self, stage: int, group: dist.ProcessGroup) -> None:
        peer = _sender(group)
        try:
            while True:
                message = self._receive_message(peer, group)
                self._results.put((stage, message))
                if not message:  # the stage has ended
                    return
        except RankLostError as error:
            self._results.put(error)
        except ValueError:  # raised by torch for a group that `shutdown` destroyed
            if not self._is_shut_down:
                raise

    def _send_message(self, message: bytes, peer: int, group: dist.ProcessGroup) -> None:
        self._send(torch.tensor([len(message)]), peer, group)
        self._send(_bytes(message), peer, group)

    def _receive_message(self, peer: int, group: dist.ProcessGroup) -> bytes:
        size = self._receive_next(torch.empty(1, dtype=torch.int64), peer, group)
        data = torch.empty(int(size), dtype=torch.uint8)
        return self._receive(data, peer, group).numpy().tobytes()

    def _send(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> None:
        if not tensor.numel():
            return
        while len(self._sent) >= _MAX_IN_FLIGHT:
            work, _ = self._sent.popleft()
            self._try(work.wait)
        work = self._try(lambda: dist.isend(tensor, peer, group))
        self._sent.append((work, tensor))  # the tensor must live until the send completes

    def _receive(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Tensor:
        if tensor.numel():
            self._try(lambda: dist.recv(tensor, peer, group))
        return tensor

    def _receive_next(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Tensor:
        """Receive the start of the next message over a CPU group, however long that takes."""
        work = self._try(lambda: dist.irecv(tensor, peer, group))
        self._try(lambda: work.wait(_UNLIMITED))
        return tensor

    def _try(self, communicate):
        try:
            return communicate()
        except RuntimeError as error:
            message = (
                f"stage {self.stage}, tensor rank {self.tensor_rank} lost another rank, or waited "
                f"{self.timeout_s:g} s for it. Look at the output of the other ranks first: {error}"
            )
            raise RankLostError(self._lost() or message) from error

    def _lost(self) -> str:
        return self.describe_lost() if self.describe_lost and not self._is_shut_down else ""


def check_gpus(tensor: int, pipeline: int) -> None:
    """Raise UserError if this machine has GPUs, but fewer than one for each rank."""
    num_gpus = devices.num_gpus()
    if 0 < num_gpus < tensor * pipeline:
        raise UserError(
            f"tensor = {tensor} x pipeline = {pipeline} needs {tensor * pipeline} GPUs, but this"
            f" machine has {num_gpus}. Use fewer ranks, or set CUDA_VISIBLE_DEVICES= to compute on"
            " the CPU."
        )


def connect(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    timeout_s: float = 600,
    store: dist.Store | None = None,
    rank: int = 0,
) -> InferenceGrid:
    """Join the tensor x pipeline ranks that decode one model.

    Args:
        tensor: Number of tensor-parallel ranks of each pipeline stage.
        pipeline: Number of pipeline stages.
        timeout_s: Maximum number of seconds to wait for another rank within a pass.
        store: Store through which the ranks find each other. By default, the rank, the world size
            and the address of the store come from torchrun's environment.
        rank: Rank of this process, if `store` is given.

    Raises:
        UserError: The environment is invalid, the world size is not tensor x pipeline, or this
            process already uses torch.distributed.
        RankLostError: Not all ranks joined in time.
    """
    environment.refuse_second_group()
    world_size = tensor * pipeline if store else environment.launched_world_size() or 1
    if world_size != tensor * pipeline:
        raise UserError(
            f"tensor = {tensor} x pipeline = {pipeline} needs {tensor * pipeline} ranks, but the "
            f"world size is {world_size}. Start {tensor * pipeline} ranks."
        )
    timeout = datetime.timedelta(seconds=timeout_s)
    options: dict[str, Any] = {}
    if store is not None:
        store.set_timeout(timeout)
        options = {"store": store, "rank": rank, "world_size": world_size}
    try:
        dist.init_process_group(devices.backend(), timeout=timeout, **options)
        return _make_grid(tensor, pipeline, timeout)
    except BaseException as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        if not isinstance(error, RuntimeError):
            raise
        raise RankLostError(
            f"not all of {world_size} ranks joined within {timeout_s:g} s. Look at the output of"
            f" the other ranks first: {error}"
        ) from error


def _make_grid(tensor: int, pipeline: int, timeout: datetime.timedelta) -> InferenceGrid:
    """Create the groups of all ranks, collectively."""
    rank = dist.get_rank()
    stage, tensor_rank = divmod(rank, tensor)

    def own_group(members: list[list[int]], backend: str) -> dist.ProcessGroup:
        """Create a group per list of ranks, collectively, and return the one of this rank."""
        groups = [dist.new_group(ranks, timeout=timeout, backend=backend) for ranks in members]
        return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)

    rows = [[s * tensor + t for t in range(tensor)] for s in range(pipeline)]
    columns = [[s * tensor + t for s in range(pipeline)] for t in range(tensor)]
    result_groups = {
        s: dist.new_group([0, s * tensor], timeout=timeout, backend="gloo")
        for s in range(1, pipeline)
    }
    return InferenceGrid(
        tensor_rank=tensor_rank,
        tensor_size=tensor,
        stage=stage,
        num_stages=pipeline,
        timeout_s=timeout.total_seconds(),
        _tensor_group=own_group(rows, devices.backend()),
        _tensor_control=own_group(rows, "gloo"),
        _column_ranks=columns[tensor_rank],
        _column_group=own_group(columns, devices.backend()),
        _column_control=own_group(columns, "gloo"),
        _result_groups=result_groups,
    )


def _sender(group: dist.ProcessGroup) -> int:
    """Return the rank that sends results to the leader over a group."""
    return next(rank for rank in dist.get_process_group_ranks(group) if rank != 0)


def _bytes(message: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if message
        else torch.empty(0, dtype=torch.uint8)
    )
