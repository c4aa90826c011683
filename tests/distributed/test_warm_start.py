"""Runs that start from the weights of a checkpoint that no run has written."""

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from tests.distributed.runs import layout, make_config, tensors_of, train_ranks, write_random

STANDING = {"optimizer.lr": 1e-30, "optimizer.warmup_steps": 0, "training.steps": 2}


def start(tmp_path, corpus, **options):
    """Return the configuration of a run that starts from random tensors, and the tensors."""
    config = make_config(tmp_path / "run", corpus, **options)
    path, tensors = write_random(tmp_path / "begin", config)
    return config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"initial": str(path)})}
    ), tensors


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, {}),
        (2, layout(1, 2)),
        (2, layout(2, 1)),
        (1, {"training.dtype": "bfloat16"}),
        (2, {"training.dtype": "bfloat16"}),
        (1, {"training.dtype": "auto", "model.qk_norm": True}),
    ],
    ids=["single", "dp2", "pp2", "tp2", "bf16", "dp2-bf16", "auto"],
)
def test_run_starts_from_the_weights(tmp_path, corpus, world_size, options):
    """Two steps with learning rate 0 keep them; wrong master weights would change them."""
    config, tensors = start(tmp_path, corpus, **STANDING | options)
    end, *_ = train_ranks(world_size, config)
    assert end.endswith("step-00000002")
    found = tensors_of(end)
    dtype = found["embedding.word.weight"].dtype
    assert dtype == (
        torch.bfloat16 if TensorReader(end).config().training.dtype == "bfloat16" else torch.float32
    )
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(dtype)), name


def test_run_resumes_from_its_own_checkpoint(tmp_path, corpus):
    config, _ = start(tmp_path, corpus, **{"training.steps": 2})
    [first] = train_ranks(1, config)
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 4})})
    [second] = train_ranks(1, longer)
    assert (first[-1], second[-1]) == ("2", "4")
