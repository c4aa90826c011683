"""Damaged weights in an archive are detected. torch does not verify the checksums."""

import pytest
import torch
from torch.distributed import checkpoint as dcp

from ee_llm.checkpoint.format import safe
from ee_llm.checkpoint.read import fill
from ee_llm.conversion.megatron.archive import Archive
from ee_llm.errors import CheckpointError
from tests.unit.checkpoint.damage import flip, flipped

SHARED = torch.arange(1000.0)


@pytest.fixture
def path(tmp_path):
    """An archive with a tensor that has its own storage, and two that share one."""
    path = tmp_path / "model_optim_rng.pt"
    whole = torch.linspace(0, 1, 64).reshape(8, 8)
    torch.save({"whole": whole, "first": SHARED[:300], "second": SHARED[500:]}, path)
    return path


def read(path, key):
    archive = Archive(path)
    return archive.tensor(archive.stored(archive.content[key], key))


@pytest.mark.parametrize("key", ["whole", "first", "second"])
def test_a_flipped_byte_in_a_tensor_is_found(path, key):
    expected = torch.load(path)[key]
    assert torch.equal(read(path, key), expected)
    offset = path.read_bytes().index(expected.numpy().tobytes()) + 7
    with flipped(path, offset):
        with pytest.raises(
            CheckpointError, match=r"model_optim_rng\.pt is damaged: its part data/\d"
        ):
            read(path, key)
        other = "first" if key == "whole" else "whole"
        assert torch.equal(read(path, other), torch.load(path)[other])
    assert torch.equal(read(path, key), expected)


def test_a_flipped_byte_in_the_pickle_is_found(path):
    flip(path, path.read_bytes().index(b"second"))
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt"):
        Archive(path)


def test_a_flipped_byte_in_a_distributed_checkpoint_is_found(tmp_path):
    """Checkpoints of megatron-core have no manifest."""
    tensor = torch.linspace(0, 1, 64)
    dcp.save({"a": tensor}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    [entry] = safe.read_metadata(tmp_path).values()
    [file] = tmp_path.glob("*.distcp")
    flip(file, file.read_bytes().index(tensor.numpy().tobytes()) + 100)
    with pytest.raises(CheckpointError, match=r"distcp .*it is damaged: its part archive/data/0"):
        fill(torch.empty(64), tmp_path, "a", entry, (0,))
