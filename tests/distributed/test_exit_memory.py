"""The number of live exit logits on a stage: with deferred exits, one exit of one microbatch.

Shapes: s sequence, b microbatch, v vocabulary.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ee_llm import distributed
from ee_llm.config import load_config
from ee_llm.data import Microbatch
from ee_llm.pipeline.planner.costs import NOMINAL
from ee_llm.pipeline.planner.predict import predict
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from ee_llm.training.parallel import ParallelModel, StageOnData

NUM_MICROBATCHES, BATCH, LENGTH, VOCAB = 6, 2, 10, 56  # b * s is not the hidden size


class LiveLogits(TorchDispatchMode):
    """Counts the exits with a live tensor of the size of logits.

    Within the mode, every result of b * s * v elements (logits, their gradients, tensors that the
    cross entropy keeps) is recorded by weak reference for exit `current`. A tensor that autograd
    has saved is alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[object, list[weakref.ref]] = {}
        self.current: object = None
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.numel() == BATCH * LENGTH * VOCAB:
                self.noted.setdefault(self.current, []).append(weakref.ref(result))
                self.most = max(self.most, self.count())
        return results

    def count(self) -> int:
        return sum(any(ref() is not None for ref in refs) for refs in self.noted.values())


class Counting(StageOnData):
    """A stage that sets the current exit and microbatch of `live`."""

    live: LiveLogits

    def exit_loss(self, microbatch, index, tap):
        self.live.current = (microbatch, index)
        return super().exit_loss(microbatch, index, tap)


def _most_alive(deferred: bool, recompute: str, training: bool, schedule: str = "1f1b"):
    options = {
        "model.num_layers": 4,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.ffn_hidden_size": 24,
        "model.vocab_size": VOCAB,
        "model.max_seq_length": LENGTH,
        "exits.boundaries": (1, 2, 3),
        "exits.output": "own",
        "exits.temperatures": (2.0, 1.0, 1.0),
        "exits.deferred": deferred,
        "parallel.pipeline": 2,
        "parallel.schedule": schedule,
        "parallel.timeout_s": 20.0,
        "training.recompute": recompute,
        "training.micro_batch_size": BATCH,
        "training.global_batch_size": NUM_MICROBATCHES * BATCH,
    }
    config = load_config(None, options)
    grid = distributed.initialize(pipeline=2, timeout_s=20)
    model = ParallelModel(config, grid, torch.float32)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    batch = Microbatch(tokens, tokens, torch.ones(BATCH, LENGTH), positions)
    live = LiveLogits()
    for stage in model._on_data.values():
        stage.__class__ = Counting
        stage.live = live
    with live:
        if training:
            model.forward_backward([batch] * NUM_MICROBATCHES, step=0)
        else:
            model.evaluate([[batch] * NUM_MICROBATCHES])
    assert len(live.noted) == NUM_MICROBATCHES * 2, "two exits on each stage"
    if training:
        predicted = predict(config, NUM_MICROBATCHES, NOMINAL).simulation
        assert live.most == predicted.peak_exit_logits[grid.pipeline_rank]
    return live.most, live.count()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_deferred_exits_are_alive_one_at_a_time(recompute):
    assert run_ranks(2, _most_alive, True, recompute, True) == [(1, 0), (1, 0)]


def test_evaluation_keeps_no_logits():
    assert run_ranks(2, _most_alive, True, "none", False) == [(1, 0), (1, 0)]


@pytest.mark.parametrize("deferred", [True, False])
def test_splitting_only_layers_keeps_no_logits(deferred):
    expected = [(1, 0), (1, 0)] if deferred else [(4, 0), (2, 0)]
    assert run_ranks(2, _most_alive, deferred, "none", True, "zero-bubble") == expected


@pytest.mark.parametrize("deferred", [True, False])
def test_split_exits_keep_logits_until_their_weights(deferred):
    """Rank r defers the weight gradients of r + 1 microbatches, of two exits on each stage."""
    expected = [(2, 0), (4, 0)] if deferred else [(4, 0), (4, 0)]
    assert run_ranks(2, _most_alive, deferred, "none", True, "zero-bubble-exits") == expected


def test_logits_accumulate_without_deferral():
    """Shows that the count works: two exits of each of the P - i microbatches in flight."""
    assert run_ranks(2, _most_alive, False, "none", True) == [(4, 0), (2, 0)]
