"""Reading tensors by name, and errors for incomplete checkpoints."""

import json
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from ee_llm.checkpoint import directory, tokenizer
from ee_llm.checkpoint.read import CheckpointError, TensorReader
from tests.unit.checkpoint.checkpoints import (
    TENSORS,
    edit_metadata,
    reseal,
    write_checkpoint,
    write_manifest,
)


def test_tensors_come_back(tmp_path):
    write_checkpoint(tmp_path)
    reader = TensorReader(tmp_path)  # the run's directory
    assert reader.names() == ["embedding.word.weight", "layers.1.norm.weight"]
    assert reader.names(optimizer=True) == ["optimizer.state.exp_avg.embedding.word.weight"]
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert (reader.shape(name), reader.dtype(name)) == (tensor.shape, tensor.dtype)
        assert name in reader
    assert reader.config().model.num_layers == 8
    assert reader.tokenizer() == "bytes"


def test_part_of_a_tensor(tmp_path):
    reader = TensorReader(write_checkpoint(tmp_path))
    part = torch.empty(2, 1, dtype=torch.float64)
    reader.read_into(part, "embedding.word.weight", (1, 2))
    assert part.tolist() == [[5.0], [8.0]]
    with pytest.raises(CheckpointError, match=r"has shape \[4, 3\].* from \[3, 2\] to \[5, 3\]"):
        reader.read_into(part, "embedding.word.weight", (3, 2))


def test_unknown_tensor(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tensor 'output\.weight'"):
        TensorReader(write_checkpoint(tmp_path)).tensor("output.weight")


def test_tensor_with_a_gap_is_refused(tmp_path):
    """Otherwise the rows that no rank wrote would be uninitialised memory."""
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        metadata.state_dict_metadata["embedding.word.weight"].size = torch.Size([6, 3])

    edit_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match="12 of 18 elements"):
        TensorReader(checkpoint)


@pytest.mark.parametrize(
    ("offsets", "sizes"), [((2, 0), (4, 3)), ((-1, 0), (4, 3)), ((0,), (12,)), ((0, 0), (-4, -3))]
)
def test_block_outside_its_tensor_is_refused(tmp_path, offsets, sizes):
    checkpoint = write_checkpoint(tmp_path)

    def change(metadata):
        [chunk] = metadata.state_dict_metadata["embedding.word.weight"].chunks
        [index] = [i for i in metadata.storage_data if i.fqn == "embedding.word.weight"]
        info = metadata.storage_data.pop(index)
        chunk.offsets, chunk.sizes = offsets, sizes
        metadata.storage_data[MetadataIndex(index.fqn, offsets)] = info

    edit_metadata(checkpoint, change)
    with pytest.raises(
        CheckpointError, match=r"a block of 'embedding\.word\.weight' at .* does not"
    ):
        TensorReader(checkpoint)


def test_overlapping_blocks_are_refused(tmp_path):
    """Overlapping blocks leave a gap elsewhere."""
    checkpoint = write_checkpoint(tmp_path, tensors={"a": torch.ones(2), "b": torch.zeros(4)})

    def change(metadata):
        twice = metadata.state_dict_metadata["a"].chunks * 2
        metadata.state_dict_metadata["a"].chunks = twice
        metadata.state_dict_metadata["a"].size = torch.Size([4])

    edit_metadata(checkpoint, change)
    with pytest.raises(CheckpointError, match="two blocks of 'a' overlap"):
        TensorReader(checkpoint)


@pytest.mark.parametrize("name", ["tensors/__0_0.distcp", "tensors/.metadata", "config.toml"])
def test_missing_and_truncated_files_are_named(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path)
    file = checkpoint / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    expected = f"{name}.* truncated: expected {len(content)} bytes, found {len(content) - 1}"
    with pytest.raises(CheckpointError, match=expected):
        TensorReader(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing: expected {len(content)} bytes"):
        TensorReader(checkpoint)


def test_errors_for_foreign_manifests(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run")
    text = json.dumps(json.loads((checkpoint / directory.MANIFEST).read_text()), indent=1)
    for old, new, expected in [
        ('"ee_llm checkpoint"', '"something else"', "expected 'ee_llm checkpoint' version 1 or 2"),
        ('"version": 2', '"version": 3', "found 'ee_llm checkpoint' version 3"),
        (text, "[1]", "expected a JSON object, found list"),
        (text, "{", "expected a JSON object"),
        (text, "[" * 200_000, "expected a JSON object"),
        ('"version": 2', '"version": 1' + "0" * 5000, "5001 digits"),
        ('"version": 2', f'"version": {2**63}', "19 digits"),
        ('"config.toml": 1', '"config.toml": -1', "files.config.toml: Input should be greater"),
        ('"tokenizer": "', '"tokenizer": 5, "t": "', "tokenizer: Input should be a valid string"),
        ('"world": 1', '"size": 1', "layout.world: Field required"),
        ('"world": 1', '"world": 1, "data": "two"', "layout.data: Input should be a valid integer"),
        ('"format"', '"mean_of": 5, "format"', "mean_of: Input should be a valid list, found 5"),
        ('"optimizer_steps": ', '"optimizer_steps": -1, "o": ', "optimizer_steps: Input should"),
        ('"config.toml"', '"../config.toml"', "outside the checkpoint's directory"),
        ('"config.toml"', '"/etc/passwd"', "outside the checkpoint's directory"),
        ('"config.toml"', '"tensors/../config.toml"', "outside the checkpoint's directory"),
        ('"crc32"', '"crc"', r"its checksums \(crc32\) do not cover its files"),
        ('"state.json": [', '"state.json": ["5 00000000",', "do not cover its files"),
        ('"state.json": [', '"state.json": ["5 0000000g",', r"crc32.state.json.0: String should"),
        ('"state.json": [', '"state.json": ["5", ', "crc32.state.json.0: String should match"),
    ]:
        assert old in text
        write_manifest(checkpoint, text.replace(old, new))
        with pytest.raises(CheckpointError, match=expected):
            TensorReader(checkpoint)
    megatron = tmp_path / "iter_0000100"
    megatron.mkdir()
    (megatron / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(CheckpointError, match="not a complete checkpoint of ee_llm"):
        TensorReader(megatron)


def test_tokenizer_must_match_the_manifest(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run")
    source = tmp_path / "spm.model"
    source.write_bytes(b"model")

    def set_tokenizer(fingerprint):
        reseal(checkpoint, lambda facts: facts.update(tokenizer=fingerprint))

    fingerprint = tokenizer.fingerprint(str(source))
    set_tokenizer(fingerprint)
    with pytest.raises(CheckpointError, match="tokenizer is missing: expected the tokenizer sha2"):
        TensorReader(checkpoint).tokenizer()
    tokenizer.store(str(source), checkpoint)
    with pytest.raises(CheckpointError, match=r"spm\.model does not belong to this checkpoint"):
        TensorReader(checkpoint)
    set_tokenizer(fingerprint)
    stored = TensorReader(checkpoint).tokenizer()
    assert stored == str(checkpoint / "tokenizer" / "spm.model")
    (checkpoint / "tokenizer" / "spm.model").write_bytes(b"other")
    for stated in (fingerprint, "bytes"):
        set_tokenizer(stated)
        with pytest.raises(CheckpointError, match=r"spm\.model .* is not the tokenizer that"):
            TensorReader(checkpoint).tokenizer()
    reseal(checkpoint, lambda facts: facts.pop("tokenizer"))
    with pytest.raises(CheckpointError, match="manifest.json: tokenizer: Field required"):
        TensorReader(checkpoint).tokenizer()


@pytest.mark.thorough
def test_reading_needs_no_megatron(tmp_path):
    """Inference reads checkpoints on machines without megatron-core."""
    write_checkpoint(tmp_path)
    program = (
        "import sys; sys.modules['megatron'] = None; sys.modules['megatron.core'] = None\n"
        "from ee_llm.checkpoint.read import TensorReader\n"
        f"reader = TensorReader({str(tmp_path)!r})\n"
        "print(sum(reader.tensor(name).sum().item() for name in reader.names()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "69.0", done.stderr
