"""Token files: ours and megatron-core's are the same files, and damage is told."""

import os
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_llm import distributed
from ee_llm.atomic_file import AtomicFile
from ee_llm.data.indexed import IndexedTokens, IndexedWriter, token_dtype
from tests.unit.data.conftest import read_documents

distributed.enable_megatron()
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)

TYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]
DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 0]]


def write(prefix: Path | str, documents: list[list[int]], dtype: Any = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
        writer.commit()


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.int64), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", TYPES)
def test_same_bytes_as_megatron(tmp_path: Path, dtype: type):
    write(tmp_path / "ours", DOCUMENTS, dtype)
    write_with_megatron(tmp_path / "theirs", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("dtype", TYPES)
def test_megatron_reads_ours(tmp_path: Path, dtype: type):
    write(tmp_path / "ours", DOCUMENTS, dtype)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert theirs.index.dtype is dtype
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", TYPES)
def test_ours_reads_megatron(tmp_path: Path, dtype: type):
    write_with_megatron(tmp_path / "theirs", DOCUMENTS, dtype)
    ours = IndexedTokens(tmp_path / "theirs")
    assert ours.dtype == dtype
    assert read_documents(tmp_path / "theirs") == DOCUMENTS
    assert ours.tokens.tolist() == sum(DOCUMENTS, [])
    assert ours.num_tokens == 9


def test_documents_of_several_sequences(tmp_path: Path):
    """Megatron's sentence-split data: a document is what lies between two bounds."""
    builder = IndexedDatasetBuilder(f"{tmp_path}/split.bin", dtype=np.int32)
    builder.add_document(np.arange(7), [3, 4])
    builder.add_item(torch.tensor([7, 8]))
    builder.end_document()
    builder.finalize(f"{tmp_path}/split.idx")
    assert read_documents(tmp_path / "split") == [[0, 1, 2, 3, 4, 5, 6], [7, 8]]


def test_same_type_as_megatron():
    for vocab_size in (257, 65_499, 65_500, 200_000):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@settings(deadline=None, max_examples=50)
@given(
    documents=st.lists(st.lists(st.integers(0, 2**16 - 1)), min_size=1).filter(any),
    group=st.integers(1, 4),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], group: int
):
    """However the documents are handed over, singly or several at once, they come back."""
    prefix = tmp_path_factory.mktemp("round") / "trip"
    with IndexedWriter(prefix, np.uint16) as writer:
        for start in range(0, len(documents), group):
            some = documents[start : start + group]
            writer.add(sum(some, []), [len(document) for document in some])
        writer.commit()
    assert writer.num_documents == len(documents)
    assert read_documents(prefix) == documents


def test_prefix_with_a_dot(tmp_path: Path):
    write(tmp_path / "corpus.v2", [[1, 2]])
    assert sorted(os.listdir(tmp_path)) == ["corpus.v2.bin", "corpus.v2.idx"]
    assert IndexedTokens(f"{tmp_path}/corpus.v2").num_tokens == 2


def test_without_commit_nothing_changes(tmp_path: Path):
    write(tmp_path / "a", [[1, 2, 3]])
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([9] * 100)
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "a", [[8] * 100, [-1]])
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    assert IndexedTokens(tmp_path / "a").tokens.tolist() == [1, 2, 3]


def test_full_disk_leaves_the_data_of_before(tmp_path: Path):
    """A limit on the size of files stands for the end of the disk: the same call fails alike."""
    write(tmp_path / "a", [[1, 2, 3]])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*a\.bin'"):
            write(tmp_path / "a", [[9] * 10_000] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    assert IndexedTokens(tmp_path / "a").tokens.tolist() == [1, 2, 3]


def test_interrupted_replacement_is_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the two renames there must be no index, rather than the old one with new tokens.

    Here both have the same size, so that nothing else would tell.
    """
    write(tmp_path / "a", [[1, 2, 3]])
    commit = AtomicFile.commit

    num_done = 0

    def interrupted(self: AtomicFile) -> None:
        nonlocal num_done
        if num_done == 1:
            raise KeyboardInterrupt
        commit(self)
        num_done += 1

    monkeypatch.setattr(AtomicFile, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[7, 8, 9]])
    with pytest.raises(ValueError, match=r"a\.idx does not exist"):
        IndexedTokens(tmp_path / "a")


def test_tokens_that_do_not_fit_the_type(tmp_path: Path):
    with (
        IndexedWriter(tmp_path / "a", np.uint16) as writer,
        pytest.raises(ValueError, match=r"token ids 5 to 65536 do not fit uint16 in .*a\.bin"),
    ):
        writer.add([65536, 5])


def test_types_that_are_no_tokens(tmp_path: Path):
    with pytest.raises(ValueError, match="can not be stored as float32; use one of uint8, int8"):
        IndexedWriter(tmp_path / "a", np.float32)


def patched(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


HEAD = 34  # bytes before the lengths


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, b: i.unlink(), r"a\.idx does not exist; make it with 'ee-llm data prepare'"),
        (lambda i, b: b.unlink(), r"a\.bin does not exist; make it"),
        (lambda i, b: i.write_bytes(b""), r"a\.idx: not a Megatron index, expected it to begin"),
        (lambda i, b: i.write_bytes(b"MMIDIDX"), r"a\.idx: truncated, expected at least 34 bytes"),
        (lambda i, b: i.write_bytes(b"PK\3\4" * 20), r"a\.idx: not a Megatron index.* found b'PK"),
        (lambda i, b: patched(i, 9, b"\2"), r"a\.idx: expected version 1 of the format, found 2"),
        (lambda i, b: patched(i, 17, b"\7"), r"a\.idx: expected tokens of type uint8.* code 7"),
        (lambda i, b: patched(i, 17, b"\4"), r"a\.idx: damaged, sequences do not follow"),
        (lambda i, b: i.write_bytes(i.read_bytes()[:-8]), r"a\.idx: expected 122 .* found 114"),
        (lambda i, b: i.write_bytes(i.read_bytes() + bytes(4)), "sequence modes of multimodal"),
        (lambda i, b: patched(i, HEAD, b"\1"), r"a\.idx: damaged, sequences do not follow"),
        (lambda i, b: patched(i, 122 - 8, b"\3"), r"a\.idx: .*expected document bounds from 0 to"),
        (lambda i, b: patched(i, 122 - 40, b"\1"), r"a\.idx: .*expected document bounds from 0 to"),
        (lambda i, b: b.write_bytes(b.read_bytes()[:-1]), r"a\.bin: expected 18 bytes.* found 17"),
        (lambda i, b: b.write_bytes(b.read_bytes() * 2), r"a\.bin: expected 18 bytes.* found 36"),
    ],
)  # fmt: skip
def test_damage_is_told(tmp_path: Path, damage: Any, message: str):
    write(tmp_path / "a", DOCUMENTS)
    damage(tmp_path / "a.idx", tmp_path / "a.bin")
    with pytest.raises(ValueError, match=message):
        IndexedTokens(tmp_path / "a")


def test_header_is_as_documented(tmp_path: Path):
    write(tmp_path / "a", DOCUMENTS)
    head = (tmp_path / "a.idx").read_bytes()[:HEAD]
    assert struct.unpack("<9sQBQQ", head) == (b"MMIDIDX\0\0", 1, 8, 4, 5)


def test_no_tokens(tmp_path: Path):
    write(tmp_path / "a", [[]])
    with pytest.raises(ValueError, match=r"a\.bin: holds no tokens"):
        IndexedTokens(tmp_path / "a")


def test_prefix_with_the_suffix(tmp_path: Path):
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match=r"give the prefix without \.bin or \.idx"):
        IndexedTokens(tmp_path / "a.bin")
