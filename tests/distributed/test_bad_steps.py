"""Bad steps change nothing, and unreadable data on one rank is an error on all ranks."""

import json
import math
import os

import pytest
import torch

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.data.batches import TrainingBatches
from ee_llm.training.parallel import ParallelModel, StageOnData
from tests.distributed.harness import run_ranks
from tests.distributed.runs import (
    events,
    layout,
    make_config,
    tensors_of,
    train_here,
    train_ranks,
    training_log,
)


def _poison_gradient(steps, rank):
    def fault(model, here):
        if here in steps and model.grid.rank == rank:
            weights = dict(model.stages[0].named_parameters())
            layer = next(
                name for name in weights if name.endswith(".self_attention.linear_proj.weight")
            )
            weights[layer].main_grad[0, 0] = math.inf

    return fault


def _poison_loss(config, steps, rank):
    """Train with losses that are NaN in some steps (from 1) on one rank."""
    exit_loss, set_microbatches = StageOnData.exit_loss, StageOnData.set_microbatches
    num_started = [0]

    def count(self, microbatches, *arguments, **options):
        num_started[0] += 1
        set_microbatches(self, microbatches, *arguments, **options)

    def poisoned(self, microbatch, index, tap):
        loss = exit_loss(self, microbatch, index, tap)
        if num_started[0] in steps and os.environ["RANK"] == str(rank):
            boundary = self.stage.boundaries[index]
            self.sums[boundary] = self.sums[boundary] * math.nan
        return loss

    StageOnData.set_microbatches, StageOnData.exit_loss = count, poisoned
    return train_here(config)


def _checkpoints(output):
    return {
        int(path.name[-8:]): tensors_of(path)
        for path in directory.complete_steps(output / "checkpoints")
    }


def _same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["gradient", "loss"])
@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, layout(1, 2)), (2, layout(1, 1)), (2, layout(2, 1))],
    ids=["pp2", "dp2", "tp2"],
)
def test_bad_step_is_skipped_on_all_ranks(tmp_path, corpus, kind, world_size, options):
    """A non-finite value on one rank changes no parameter, moment or count on any rank."""
    options = options | {"checkpoint.interval": 1, "model.tie_embeddings": True}
    config = make_config(tmp_path, corpus, **options)
    # Tensor ranks share one loss, which is taken from the first of them.
    rank = 0 if kind == "loss" and options["parallel.tensor"] == 2 else 1
    if kind == "gradient":
        train_ranks(world_size, config, _poison_gradient({3}, rank))
    else:
        run_ranks(world_size, _poison_loss, config, {3}, rank)
    saved = _checkpoints(tmp_path)
    assert sorted(saved) == [1, 2, 3, 4, 5]
    assert _same(saved[2], saved[3])
    for step in (1, 3, 4):
        assert not _same(saved[step], saved[step + 1])
    for tensors in saved.values():
        assert all(tensor.isfinite().all() for tensor in tensors.values())

    log = training_log(tmp_path)
    assert [log[step]["skipped iterations"] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    [skipped] = events(tmp_path, "skipped")
    assert skipped["step"] == 3
    assert skipped["grad-norm"] is None
    poisoned = [name for name in skipped if "loss" in name and skipped[name] is None]
    assert bool(poisoned) == (kind == "loss")
    state = json.loads((tmp_path / "checkpoints/step-00000005/state.json").read_text())
    assert state["skipped_steps"] == 1
    assert state["consumed_samples"] == 5 * 4
    assert TensorReader(tmp_path).manifest["optimizer_steps"] == 4


def _mask_everything(config, steps):
    """Train without a valid token on any rank in some steps (from 1)."""
    original = ParallelModel.forward_backward

    def masked(self, microbatches, step):
        if step + 1 in steps:
            microbatches = [m._replace(loss_mask=0 * m.loss_mask) for m in microbatches]
        return original(self, microbatches, step)

    ParallelModel.forward_backward = masked
    return train_here(config)


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1)], ids=["pp2", "dp2"])
def test_step_without_a_valid_token_changes_nothing(tmp_path, corpus, sizes):
    """With gradients of 0 AdamW would still apply weight decay and its moments."""
    options = {"checkpoint.interval": 1, "optimizer.weight_decay": 0.5, **layout(*sizes)}
    run_ranks(2, _mask_everything, make_config(tmp_path, corpus, **options), {3})
    saved = _checkpoints(tmp_path)
    assert _same(saved[2], saved[3])
    assert not _same(saved[3], saved[4])
    log = training_log(tmp_path)
    assert [log[step]["skipped iterations"] for step in range(1, 6)] == [0, 0, 1, 1, 1]
    assert log[3]["lm loss"] is None
    assert [line["step"] for line in events(tmp_path, "skipped")] == [3]


def test_too_many_bad_steps_stop_the_run(tmp_path, corpus):
    """Two bad steps, a good one, then three bad ones in a row. The run can be resumed."""
    options = {"training.steps": 9, "training.max_bad_steps": 3, "checkpoint.interval": 1}
    config = make_config(tmp_path, corpus, **options, **layout(1, 2))
    bad = {2, 3, 5, 6, 7, 8}
    ends = train_ranks(2, config, _poison_gradient(bad, rank=1))
    for end in ends:
        assert end.startswith("TrainingStopped: 3 steps in a row (training.max_bad_steps)")
        assert f"saved in {tmp_path}/checkpoints/step-00000007" in end
        assert "optimizer.lr" in end
    saved = _checkpoints(tmp_path)
    assert max(saved) == 7
    assert _same(saved[4], saved[7])
    assert len(events(tmp_path, "stopped")) == 1
    [end, *_] = train_ranks(2, config)
    assert end.endswith("step-00000009")
    assert training_log(tmp_path)[9]["skipped iterations"] == 5
    assert all(tensor.isfinite().all() for tensor in tensors_of(end).values())


def _unreadable_at(config, step, rank):
    if os.environ["RANK"] == str(rank):
        read = TrainingBatches.__next__
        count = [0]

        def fail(self):
            count[0] += 1
            if count[0] == step:
                raise OSError(5, "Input/output error", "corpus.bin")
            return read(self)

        TrainingBatches.__next__ = fail
    try:
        return train_here(config)
    except OSError as error:
        return f"OSError: {error}"


def test_data_that_one_rank_cannot_read(tmp_path, corpus):
    config = make_config(tmp_path, corpus, **layout(1, 2))
    ends = run_ranks(2, _unreadable_at, config, 3, 1)
    assert ends[1].startswith("OSError: [Errno 5] Input/output error")
    assert ends[0].startswith("UserError: rank 1: OSError: [Errno 5] Input/output error")
