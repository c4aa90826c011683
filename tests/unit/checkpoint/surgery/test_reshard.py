"""Resharding: each rank's part has its own blocks in its own file, with the same bits."""

import pytest
import torch

from ee_llm.checkpoint import write
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from tests.unit.checkpoint.surgery.sources import (
    HEADS,
    all_tensors,
    assert_resumes_alike,
    assert_same,
    refusal,
    run,
    save,
    tiny,
)

pytestmark = pytest.mark.thorough

LAYOUTS = {
    "one": (),
    "tp2": ("--tensor", 2),
    "pp4": ("--pipeline", 4),
    "uneven": ("--pipeline", 2, "--layer-split", 1, 3),
    "tp2-pp2-vp2": ("--tensor", 2, "--pipeline", 2, "--virtual", 2),
}


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_no_bit_changes(tmp_path, monkeypatch, family, options):
    monkeypatch.setattr(write, "BLOCK_BYTES", 3000)  # several blocks in a rank's part
    source = save(tmp_path / "source", tiny(family, **HEADS["block"]))
    run("reshard", source.path, *LAYOUTS[options], "--output", tmp_path / "cut")
    found = TensorReader(tmp_path / "cut")
    assert_same(all_tensors(found), all_tensors(source))
    assert_resumes_alike(found, source)
    for section in ("model", "exits", "training", "optimizer"):
        assert getattr(found.config(), section) == getattr(source.config(), section)


def test_a_rank_reads_only_its_own_file(tmp_path, monkeypatch):
    """TP2 x PP2: the parts of megatron-core's layers on a rank."""
    source = save(tmp_path / "source", tiny())
    run("reshard", source.path, "--tensor", 2, "--pipeline", 2, "--output", tmp_path / "cut")
    found = TensorReader(tmp_path / "cut")
    assert (found.config().parallel.tensor, found.config().parallel.pipeline) == (2, 2)
    files = []
    read = safe.read_chunk

    def note(directory, name, entry, chunk, check):
        files.append(chunk.file)
        return read(directory, name, entry, chunk, check)

    monkeypatch.setattr(safe, "read_chunk", note)
    # Shape, offsets and file of the part of rank 1 of 2; layers 1 and 2 are on stage 0.
    parts = {
        "embedding.word.weight": ((130, 32), (130, 0), 1),
        "layers.2.self_attention.linear_qkv.weight": ((32, 32), (32, 0), 1),
        "layers.2.mlp.linear_fc1.weight": ((24, 32), (24, 0), 1),
        "layers.3.self_attention.linear_proj.weight": ((32, 16), (0, 16), 3),
        "layers.4.mlp.linear_fc2.weight": ((32, 24), (0, 24), 3),
        "output.weight": ((130, 32), (130, 0), 3),
    }
    for name, (shape, offsets, file) in parts.items():
        for kind in ("", "optimizer.state.exp_avg."):
            part = torch.empty(shape, dtype=found.dtype(kind + name))
            ends = (offsets[0] + shape[0], offsets[1] + shape[1])
            whole = source.tensor(kind + name)[offsets[0] : ends[0], offsets[1] : ends[1]]
            files.clear()
            found.read_into(part, kind + name, offsets)
            assert torch.equal(part, whole)
            assert files == [f"__{file}_0.distcp"]
    # The second half of a gated MLP's first weight, behind the gates of both ranks.
    part = torch.empty(24, 32, dtype=torch.bfloat16)
    files.clear()
    found.read_into(part, "layers.1.mlp.linear_fc1.weight", (72, 0))
    assert files == ["__1_0.distcp"]


def test_options_that_need_more_ranks_are_switched_off(tmp_path):
    parallel = {"tensor": 2, "sequence": True, "pipeline": 2, "fill_warmup": 1}
    config = Config(**tiny().model_dump() | {"parallel": parallel})
    source = save(tmp_path / "source", config)
    run("reshard", source.path, "--output", tmp_path / "one")
    found = TensorReader(tmp_path / "one").config().parallel
    assert (found.tensor, found.sequence, found.fill_warmup) == (1, False, 0)
    run("reshard", source.path, "--tensor", 2, "--pipeline", 2, "--output", tmp_path / "same")
    assert TensorReader(tmp_path / "same").config().parallel == source.config().parallel


REFUSED = {
    "heads": (("--tensor", 4), "model.num_kv_heads = 2 is not divisible by parallel.tensor = 4"),
    "layers": (("--pipeline", 3), "model.num_layers = 4 is not divisible by parallel.pipeline = 3"),
    "split": (
        ("--pipeline", 2, "--layer-split", 1, 2),
        "parallel.layer_split = [1, 2] must be 2 positive numbers",
    ),
    "none": (("--tensor", 0), "parallel.tensor: must be greater than 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_layouts_raise(tmp_path, capsys, case):
    options, expected = REFUSED[case]
    source = save(tmp_path / "source")
    found = refusal(capsys, "reshard", source.path, *options, "--output", tmp_path / "cut")
    assert expected in found
    assert not (tmp_path / "cut").exists()
