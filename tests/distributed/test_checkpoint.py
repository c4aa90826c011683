"""Saving in one layout and loading in another, with the optimizer; other readers."""

import random

import numpy as np
import pytest
import torch

from ee_llm import distributed
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.state import TrainState
from tests.distributed.harness import run_ranks
from tests.distributed.toy_run import FFN, HIDDEN, Run, save_run, union, unsharded_tensor

distributed.enable_megatron()
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def _load_run(output, layout, dtype=torch.float32, step=3):
    run = Run(output, layout, dtype)
    with torch.no_grad():
        for shard in run.shards.values():
            shard.data.fill_(7.0)
    state = run.load()
    assert state == TrainState(step=step, consumed_samples=8 * step, extra={"note": "é"})
    return run.train(step + 1, step + 2), run.weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 2, 4), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 4)),
        ((1, 1, 2), (1, 1, 1)),
        ((1, 2, 4), (2, 1, 2)),
        ((2, 1, 2), (1, 1, 4)),
    ],
    ids=lambda layout: "tp{}pp{}world{}".format(*layout),
)
def test_resuming_in_another_layout_is_equal(tmp_path, before, after, dtype):
    """Covers shards, masters, moments, step counts, tied copies and all optimizers."""
    saved = run_ranks(before[2], save_run, tmp_path, before[:2], dtype)
    loaded = run_ranks(after[2], _load_run, tmp_path, after[:2], dtype)
    assert loaded[0][0] == pytest.approx(saved[0][0], rel=1e-5)
    ours, theirs = union(saved), union(loaded)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6, msg=name)


def _draws():
    """Return one number of every random generator that a run may use."""
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return (
        torch.rand(1).item(),
        tracked,
        float(np.random.rand()),
        np.random.randn(),
        random.random(),
    )


def _straight(output, layout, dtype):
    run = Run(output, layout, dtype)
    _draws()
    run.train(1, 2)
    run.save(2)
    return run.train(3, 4), _draws(), run.weights()


def _resumed(output, layout, dtype):
    run = Run(output, layout, dtype)
    run.load()
    steps = {group["step"] for group in run.optimizer.param_groups if group["params"]}
    assert steps == {2}
    return run.train(3, 4), _draws(), run.weights()


@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [
        (1, (1, 1), torch.float32),
        (1, (1, 1), torch.bfloat16),
        (1, (1, 1), torch.float64),
        (2, (1, 1), torch.float32),
        (2, (1, 1), torch.float64),
        (4, (1, 2), torch.bfloat16),
        (4, (2, 2), torch.float32),
    ],
)
def test_resuming_is_bit_identical(tmp_path, world, layout, dtype):
    """Covers step counts (torch's AdamW loses them), masters and all random generators."""
    straight = run_ranks(world, _straight, tmp_path, layout, dtype)
    resumed = run_ranks(world, _resumed, tmp_path, layout, dtype)
    for one, other in zip(straight, resumed, strict=True):
        assert one[:2] == other[:2]
        for place, data in one[2].items():
            assert torch.equal(other[2][place], data), place


def _save_before_the_first_step(output):
    run = Run(output, (1, 1))
    run.save(0)
    run.load()
    assert run.train(1, 1) == [pytest.approx(run.train(1, 1)[0])]


def test_run_can_be_saved_before_its_first_step(tmp_path):
    """Adam has no moments yet, but a checkpoint without them would not load."""
    run_ranks(1, _save_before_the_first_step, tmp_path)


def _parameters_only(output):
    run = Run(output, (1, 1), torch.bfloat16)
    before = run.weights()
    run.train(1, 1)
    run.save(1)
    trained = run.weights()
    run.train(2, 3)
    run.load(optimizer=False)
    assert [group["step"] for group in run.optimizer.param_groups] == [3, 3]
    for place, data in run.weights().items():
        assert torch.equal(data, trained[place])
    assert any(not torch.equal(before[place], data) for place, data in trained.items())


def test_loading_only_parameters(tmp_path):
    run_ranks(1, _parameters_only, tmp_path)


def test_reader_assembles_unsharded_tensors(tmp_path):
    """Tensors of four ranks, including gate and up of SwiGLU, equal those of one process."""
    saved = run_ranks(4, _save_twice, tmp_path, (2, 2))
    reader = TensorReader(tmp_path)
    wholes = union(saved)
    assert reader.names() == sorted(wholes)
    for name, whole in wholes.items():
        assert torch.equal(reader.tensor(name).double(), whole), name
    weight = reader.tensor("layers.2.fc1.weight")
    assert torch.equal(
        weight.double(),
        unsharded_tensor("layers.2.fc1.weight", (2 * FFN, HIDDEN), "weight").float().double(),
    )
    masters = {name for name in reader.names(optimizer=True) if "exp_avg" not in name}
    assert masters == set()  # float32 parameters need none


def _save_twice(output, layout):
    run = Run(output, layout)
    run.save(1)
    return None, run.weights()


def _read_by_megatron(output):
    distributed.initialize()
    path = directory.find_latest(output) / directory.TENSORS
    return dist_checkpointing.load_plain_tensors(str(path))


def test_megatron_core_reads_the_checkpoint(checkpoint):
    """The format is torch_dist, which other tools read."""
    [tensors] = run_ranks(1, _read_by_megatron, checkpoint)
    reader = TensorReader(checkpoint)
    assert sorted(tensors) == sorted(reader.names() + reader.names(optimizer=True))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, reader.tensor(name)), name
