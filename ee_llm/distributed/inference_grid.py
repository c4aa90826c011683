"""Ranks that decode together: tensor-parallel groups, a pipeline of them, and their messages."""

import contextlib
import datetime
import queue
import threading
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ee_llm.distributed import devices, environment
from ee_llm.errors import RunError, UserError

_MAX_IN_FLIGHT = 32  # tensors; a pass has up to four


class RankLostError(RunError):
    """Another rank is gone, or did not answer in time."""


@dataclass
class InferenceGrid:
    """This rank's place, pipeline stage by tensor rank, and what it says to the others.

    Rank 0 (stage 0, tensor rank 0) leads: it alone knows the requests. Bytes travel over CPU
    groups, hidden states over the device's own. Every wait ends after `timeout_s`, with a
    RankLostError.
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
    _answer_groups: dict[int, dist.ProcessGroup]
    _answers: "queue.SimpleQueue[tuple[int, bytes] | Exception]" = field(
        default_factory=queue.SimpleQueue
    )
    _sent: "deque[tuple[dist.Work, Tensor]]" = field(default_factory=deque)
    _listeners: list[threading.Thread] = field(default_factory=list)
    _has_left: bool = False

    @property
    def is_leader(self) -> bool:
        """Return whether this rank takes the requests."""
        return self.stage == 0 and self.tensor_rank == 0

    def reduce(self, partial: Tensor) -> Tensor:
        """Return the sum of `partial` over the tensor-parallel ranks, the same bits on each."""
        self._try(lambda: dist.all_reduce(partial, group=self._tensor_group))
        return partial

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts [r, n] of all tensor-parallel ranks side by side: [r, n * ranks]."""
        if self.tensor_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.tensor_size)]
        self._try(lambda: dist.all_gather(parts, part.contiguous(), group=self._tensor_group))
        return torch.cat(parts, dim=-1)

    def tell(self, message: bytes = b"") -> bytes:
        """Return the message of tensor rank 0, which alone gives one, on all ranks of its group."""
        if self.tensor_size == 1:
            return message
        source = dist.get_process_group_ranks(self._tensor_control)[0]
        size = torch.tensor([len(message)])
        self._try(lambda: dist.broadcast(size, source, self._tensor_control))
        data = (
            _bytes(message) if self.tensor_rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        )
        if len(data):
            self._try(lambda: dist.broadcast(data, source, self._tensor_control))
        return data.numpy().tobytes()

    def pass_on(self, message: bytes, hidden: Tensor) -> None:
        """Send a message and hidden states [t, h] to the next stage, without waiting for it."""
        peer = self._column_ranks[self.stage + 1]
        self._send(torch.tensor([len(message), len(hidden)]), peer, self._column_control)
        self._send(_bytes(message), peer, self._column_control)
        if len(hidden):
            self._send(hidden.contiguous(), peer, self._column_group)

    def take_over(self, hidden_size: int, dtype: torch.dtype) -> tuple[bytes, Tensor]:
        """Return what the stage before passed on."""
        peer = self._column_ranks[self.stage - 1]
        sizes = self._receive(torch.empty(2, dtype=torch.int64), peer, self._column_control)
        message = torch.empty(int(sizes[0]), dtype=torch.uint8)
        message = self._receive(message, peer, self._column_control)
        hidden = torch.empty(int(sizes[1]), hidden_size, dtype=dtype, device=devices.device())
        if len(hidden):
            self._receive(hidden, peer, self._column_group)
        return message.numpy().tobytes(), hidden

    def pass_on_numbers(self, numbers: list[int]) -> None:
        """Send as many numbers as the next stage expects, without waiting for it."""
        peer = self._column_ranks[self.stage + 1]
        self._send(torch.tensor(numbers, dtype=torch.int64), peer, self._column_control)

    def take_over_numbers(self, count: int) -> list[int]:
        """Return the numbers that the stage before passed on."""
        peer = self._column_ranks[self.stage - 1]
        numbers = torch.empty(count, dtype=torch.int64)
        return self._receive(numbers, peer, self._column_control).tolist()

    def answer(self, message: bytes) -> None:
        """Send a message to the leader; tensor rank 0 of each stage but the first does."""
        group = self._answer_groups[self.stage]
        self._send(torch.tensor([len(message)]), 0, group)
        self._send(_bytes(message), 0, group)

    def flush(self) -> None:
        """Wait, at the end, until all that was sent has been taken.

        Who has taken the last of it may be gone by then, so that a lost rank is no error here.
        """
        while self._sent:
            work, _ = self._sent.popleft()
            with contextlib.suppress(RuntimeError):
                work.wait()

    def listen(self) -> None:
        """Let the leader receive answers from now on, of each stage in the background."""
        for stage, group in self._answer_groups.items():
            thread = threading.Thread(target=self._listen_to, args=(stage, group), daemon=True)
            thread.start()
            self._listeners.append(thread)

    def await_farewells(self) -> None:
        """Wait until every stage that the leader listens to has said that it ends."""
        for thread in self._listeners:
            thread.join(self.timeout_s)

    def leave(self) -> None:
        """End the groups; ranks that still wait for this one learn at once that it has gone."""
        if self._has_left:
            return
        self._has_left = True
        dist.destroy_process_group()
        # Connections are closed when nothing refers to their group any more.
        del self._tensor_group, self._tensor_control, self._column_group, self._column_control
        self._answer_groups.clear()
        self._sent.clear()

    def next_answer(self, wait: bool) -> tuple[int, bytes] | None:
        """Return a stage and its answer; None if there is none (yet, unless told to wait)."""
        try:
            answer = self._answers.get(wait, self.timeout_s if wait else None)
        except queue.Empty:
            if not wait:
                return None
            raise RankLostError(f"no stage answered within {self.timeout_s:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _listen_to(self, stage: int, group: dist.ProcessGroup) -> None:
        peer = next(rank for rank in dist.get_process_group_ranks(group) if rank != 0)
        try:
            while True:
                size = self._receive(torch.empty(1, dtype=torch.int64), peer, group)
                data = torch.empty(int(size), dtype=torch.uint8)
                message = self._receive(data, peer, group).numpy().tobytes()
                self._answers.put((stage, message))
                if not message:  # its farewell
                    return
        except RankLostError as error:
            self._answers.put(error)
        except ValueError:  # torch no longer knows the group
            if not self._has_left:
                raise

    def _send(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> None:
        if not tensor.numel():
            return
        while len(self._sent) >= _MAX_IN_FLIGHT:
            work, _ = self._sent.popleft()
            self._try(work.wait)
        work = self._try(lambda: dist.isend(tensor, peer, group))
        self._sent.append((work, tensor))  # which must live until it has been taken

    def _receive(self, tensor: Tensor, peer: int, group: dist.ProcessGroup) -> Tensor:
        if tensor.numel():
            self._try(lambda: dist.recv(tensor, peer, group))
        return tensor

    def _try(self, communicate):
        try:
            return communicate()
        except RuntimeError as error:
            raise RankLostError(
                f"stage {self.stage}, tensor rank {self.tensor_rank} lost another rank, or waited"
                f" {self.timeout_s:g} s for it; look at the other ranks' output first: {error}"
            ) from error


def connect(*, tensor: int = 1, pipeline: int = 1, timeout_s: float = 600) -> InferenceGrid:
    """Join tensor x pipeline ranks that decode one model; reads torchrun's environment.

    Raises UserError if the environment is wrong, or there are not as many ranks.
    """
    world_size = environment.launched_world_size() or 1
    if world_size != tensor * pipeline:
        raise UserError(
            f"{world_size} ranks do not fit --tensor {tensor} x --pipeline {pipeline}; start"
            f" {tensor * pipeline} ranks"
        )
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(devices.backend(), timeout=timeout)
    rank = dist.get_rank()
    stage, tensor_rank = divmod(rank, tensor)

    def groups(members: list[list[int]], backend: str) -> dist.ProcessGroup:
        """Return this rank's own of several groups, which all ranks make together."""
        made = [dist.new_group(ranks, timeout=timeout, backend=backend) for ranks in members]
        return next(group for group, ranks in zip(made, members, strict=True) if rank in ranks)

    rows = [[s * tensor + t for t in range(tensor)] for s in range(pipeline)]
    columns = [[s * tensor + t for s in range(pipeline)] for t in range(tensor)]
    answer_groups = {
        s: dist.new_group([0, s * tensor], timeout=timeout, backend="gloo")
        for s in range(1, pipeline)
    }
    return InferenceGrid(
        tensor_rank=tensor_rank,
        tensor_size=tensor,
        stage=stage,
        num_stages=pipeline,
        timeout_s=timeout_s,
        _tensor_group=groups(rows, devices.backend()),
        _tensor_control=groups(rows, "gloo"),
        _column_ranks=columns[tensor_rank],
        _column_group=groups(columns, devices.backend()),
        _column_control=groups(columns, "gloo"),
        _answer_groups=answer_groups,
    )


def _bytes(message: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if message
        else torch.empty(0, dtype=torch.uint8)
    )
