"""Distributed checkpoints of megatron-core: conversion, and errors for bad ones."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ee_llm.conversion.open_source import open_source
from tests.unit.conversion.megatron.megatron_files import Writer, save
from tests.unit.conversion.megatron.test_megatron_ranks import make
from tests.unit.conversion.megatron.test_megatron_refusals import Call, error_of


def distributed(path: Path, tensors=None, **content) -> Path:
    """Write a distributed checkpoint, by its documentation, with torch's writer."""
    config, ours = make(boundaries=(), output="shared")
    writer = Writer(config, ours, names="core")
    state = {"embedding.word_embeddings.weight": writer.padded(0, "embedding.word.weight")}
    state["output_layer.weight"] = writer.padded(0, "output.weight")
    state["decoder.final_layernorm.weight"] = ours["exits.4.norm.weight"]
    stage = writer.stage(0, 0)
    for key in [key for key in stage if key.startswith("decoder.layers.0.")]:
        rest = key.removeprefix("decoder.layers.0.")
        layers = [stage[f"decoder.layers.{i}.{rest}"] for i in range(4)]
        state[f"decoder.layers.{rest}"] = torch.stack(layers)
    state["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(3)
    state |= tensors or {}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    save({"args": writer.arguments, "iteration": 12} | content, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return path


def test_a_distributed_checkpoint(tmp_path):
    _, tensors = make(boundaries=(), output="shared")
    source = open_source(distributed(tmp_path), tokenizer="bytes")
    assert source.config.model.num_layers == 4
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor), name


LAYERS = "decoder.layers.mlp.linear_fc2.weight"
DISTRIBUTED = {
    "extra tensor": (
        {"mtp.weight": torch.ones(3)},
        r".metadata: mtp.weight \[3\] is not a tensor of the llama that .*common.pt describes",
    ),
    "layers are missing": (
        {LAYERS: torch.ones(3, 32, 48)},
        r"decoder.layers.3.mlp.linear_fc2.weight is missing: expected \[32, 48\] for layers.4",
    ),
    "too many layers": (
        {LAYERS: torch.ones(5, 32, 48)},
        r"decoder.layers.4.mlp.linear_fc2.weight \[32, 48\] is not a tensor",
    ),
    "wrong shape": (
        {LAYERS: torch.ones(4, 32, 47)},
        r"decoder.layers.0.mlp.linear_fc2.weight has shape \[32, 47\], expected \[32, 48\]",
    ),
    "empty": ({LAYERS: torch.ones(4, 0)}, r"is empty"),
    "two names of one tensor": (
        {"decoder.layers.pre_mlp_layernorm.weight": torch.ones(4, 32)},
        r"are both decoder.layers.0.pre_mlp_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_distributed_checkpoints_that_do_not_fit(tmp_path, case):
    tensors, expected = DISTRIBUTED[case]
    assert re.search(expected, error_of(distributed(tmp_path, tensors)))


def test_distributed_checkpoints_of_other_kinds(tmp_path):
    path = distributed(tmp_path)
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "sharded_backend is 'zarr'. Only 'torch_dist'" in error_of(path)
    path = distributed(tmp_path / "a", args=None)
    assert "common.pt has no args" in error_of(path)
    marker = tmp_path / "marker"
    path = distributed(tmp_path / "b", rerun=Call(os.system, f"touch {marker}"))
    assert re.search(r"common.pt is rejected: it names posix.system", error_of(path))
    assert not marker.exists()
    path = distributed(tmp_path / "c")
    next(path.glob("*.distcp")).unlink()
    assert re.search(r"distcp is missing: expected", error_of(path))
