"""Tuning of a converted model, whose checkpoint no run has written."""

import pytest
import torch

from tests.distributed.runs import layout, losses_of, make_config, tensors_of, write_random
from tests.distributed.tuning_runs import NO_EXITS, SIX_LAYERS, tune, tuning_config

MODEL = {"model.qk_norm": True, "model.qkv_bias": True, "training.dtype": "float32"}


@pytest.mark.parametrize("head", [("mlp", "norm"), ("block", "norm")], ids="-".join)
@pytest.mark.parametrize(
    ("world_size", "options"),
    [(2, layout(1, 2)), (2, layout(2, 1, sequence=True))],
    ids=["pp2", "tp2-sp"],
)
def test_exits_of_a_converted_model(tmp_path, corpus, world_size, options, head):
    """Biases of queries, keys and values and norms of heads are copied and frozen as well."""
    config = make_config(tmp_path, corpus, **NO_EXITS, **SIX_LAYERS, **MODEL)
    path, tensors = write_random(tmp_path / "begin", config)
    options = {**options, **MODEL, "exits.head": head}
    end = tune(world_size, tuning_config(tmp_path / "run", corpus, path, **options))
    found = tensors_of(end)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    losses = losses_of(tmp_path / "run")
    assert losses[5, "exit 5 loss"] < losses[1, "exit 5 loss"]
