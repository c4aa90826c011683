"""Checkpoints written tensor by tensor can be read by everything else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from ee_llm.checkpoint import directory, write
from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.config import load_config

TENSORS = {
    "embedding.word.weight": torch.arange(12.0).reshape(4, 3),
    "layers.1.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "layers.1.mlp.weight": torch.arange(35, dtype=torch.float16).reshape(7, 5).t(),
    "scale": torch.tensor(3.0, dtype=torch.float64),
    "optimizer.state.exp_avg.embedding.word.weight": torch.zeros(4, 3),
}
SPECS = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
CONFIG = load_config(None, {"model.shape": "llama-tiny"})


def written(output: Path, **options) -> Path:
    return write_checkpoint(output, CONFIG, SPECS, TENSORS.__getitem__, **options)


@pytest.mark.parametrize("block_bytes", [1, 24, 32 * 2**20])
def test_tensors_come_back_bit_for_bit(tmp_path, monkeypatch, block_bytes):
    """Read by our reader, as a whole and in part, and by torch."""
    monkeypatch.setattr(write, "BLOCK_BYTES", block_bytes)
    path = written(tmp_path / "run")
    reader = TensorReader(tmp_path / "run")
    assert reader.path == path
    assert sorted(reader.names() + reader.names(optimizer=True)) == sorted(TENSORS)
    theirs = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in TENSORS.items()}
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(path / directory.TENSORS), no_dist=True)
    for name, expected in TENSORS.items():
        for found in (reader.tensor(name), theirs[name]):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    part = torch.empty(2, 2, dtype=torch.float16)
    reader.read_into(part, "layers.1.mlp.weight", (3, 4))
    assert torch.equal(part, TENSORS["layers.1.mlp.weight"][3:, 4:6])
    safe.check_common(path / directory.TENSORS)


def test_the_tokenizer_and_further_files_are_stored(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    path = written(
        tmp_path / "run",
        tokenizer_file=str(tokenizer),
        files={"origin/a.json": b"1"},
        facts={"x": 2},
    )
    reader = TensorReader(path)
    assert reader.tokenizer() == str(path / "tokenizer" / "tokenizer.json")
    assert reader.config().data.tokenizer == reader.tokenizer()
    assert reader.config().output == str(tmp_path / "run")
    assert (path / "origin" / "a.json").read_bytes() == b"1"
    assert reader.manifest["x"] == 2


def test_only_one_tensor_at_a_time_is_in_memory(tmp_path):
    """A writer that collects tensors needs as much memory as the model."""
    alive: list[int] = []

    class Counted:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def get(name: str) -> Tensor:
        tensor = torch.zeros(2, 2)
        tensor.counted = Counted()
        assert len(alive) <= 2  # this one, and the previous one until its variable is reassigned
        return tensor

    specs = {f"t{i}": TensorSpec((2, 2), torch.float32) for i in range(6)}
    calls: list[tuple[str, int]] = []
    write_checkpoint(tmp_path, CONFIG, specs, get, on_tensor=lambda *call: calls.append(call))
    assert calls == [(name, 16) for name in specs]


def test_an_existing_checkpoint_is_not_overwritten(tmp_path):
    path = written(tmp_path)
    before = (path / "manifest.json").stat()
    with pytest.raises(CheckpointError, match="already exists.*--output"):
        written(tmp_path)
    assert (path / "manifest.json").stat() == before


@pytest.mark.parametrize("wrong", [torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.float64)])
def test_a_tensor_that_differs_from_its_spec_raises(tmp_path, wrong):
    def get(name: str) -> Tensor:
        return wrong if name == "embedding.word.weight" else TENSORS[name]

    with pytest.raises(
        CheckpointError, match=r"embedding.word.weight: expected .* \[4, 3\], found"
    ):
        write_checkpoint(tmp_path, CONFIG, SPECS, get)
    assert list((tmp_path / "checkpoints").iterdir()) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from tests.unit.checkpoint.test_write import CONFIG, SPECS, TENSORS, write_checkpoint
def get(name):
    if name == "scale":
        os.kill(os.getpid(), signal.SIGKILL)
    return TENSORS[name]
write_checkpoint(sys.argv[1], CONFIG, SPECS, get)
"""


@pytest.mark.thorough
def test_a_killed_writer_leaves_no_checkpoint(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ, timeout=60, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert list((tmp_path / "checkpoints").glob("*.partial"))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        TensorReader(tmp_path)
    written(tmp_path)
    assert TensorReader(tmp_path).names()
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


FULL = """
import os, resource, signal, sys
sys.path.insert(0, os.getcwd())
from tests.unit.checkpoint.test_write import CONFIG, CheckpointError, TensorSpec, write_checkpoint
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
specs = {f"t{i}": TensorSpec((10_000,), torch.float32) for i in range(4)}
try:
    write_checkpoint(sys.argv[1], CONFIG, specs, lambda name: torch.zeros(10_000))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.thorough
def test_a_full_disk_raises_and_leaves_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env=os.environ,
        timeout=60,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "cannot write" in run.stdout
    assert "MiB are free there" in run.stdout
    assert list((tmp_path / "checkpoints").iterdir()) == []
