"""CUDA graphs overwrite their outputs, so a stage must not send those tensors themselves.

A CPU has no CUDA graphs. The stand-in below behaves like them where it matters: a replay writes to
the tensors that the first run returned.
"""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.architecture.tensors import take_tensors
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.pipeline_runner import PipelineRunner
from ee_llm.inference.execution.stage import ModelStage, partition_layers
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import TokenRange
from ee_llm.inference.scheduling.pipeline_scheduler import PipelineSchedulerOutput
from tests.unit.inference.models import random_tensors, tiny_config

LIMITS = SchedulerConfig(max_num_seqs=2, num_blocks=9, block_size=4)


def record_into_static_buffers(work: Callable[[], None]) -> Callable[[], None]:
    graph = inspect.getclosurevars(work).nonlocals["self"]
    work()
    static = graph._outputs

    def replay() -> None:
        work()
        for buffer, value in zip(static, graph._outputs, strict=True):
            buffer.copy_(value)
        graph._outputs = static

    return replay


class FirstStage(distributed.InferenceGrid):
    """The first of two stages; it keeps references to sent tensors as a pending transfer does."""

    def __init__(self) -> None:
        self.stage, self.num_stages = 0, 2
        self.tensor_rank, self.tensor_size = 0, 1
        self.sent: list[Tensor] = []

    def send_next(self, message: bytes, hidden: Tensor) -> None:
        self.sent.append(hidden)

    def send_next_numbers(self, numbers: list[int]) -> None:
        pass


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_later_pass_does_not_change_sent_hidden_states(
    cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "record", record_into_static_buffers)
    config = tiny_config(boundaries=(2,))
    tensors = take_tensors(config, random_tensors(config), torch.float64)
    positions = LIMITS.num_blocks * LIMITS.block_size
    stage = ModelStage(config, tensors, positions, partition_layers(config, 2)[0])
    ranks = FirstStage()
    execution = ExecutionConfig("plain", cuda_graphs=cuda_graphs)
    runner = PipelineRunner(stage, (2, 4), LIMITS, 32, ranks, execution)
    for number, token in enumerate((5, 9)):
        ranges, new_blocks = (TokenRange(number, 0, 1),), ((number, 0, 1 + number),)
        runner.run_first_stage(PipelineSchedulerOutput(number, ranges, (token,), (), new_blocks))
        if number == 0:
            before = ranks.sent[0].clone()
    assert torch.equal(ranks.sent[0], before)
    assert not torch.equal(ranks.sent[0], ranks.sent[1])
