"""Token files: compatibility with megatron-core, and errors for damaged files."""

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
    write(tmp_path / "ee_llm", DOCUMENTS, dtype)
    write_with_megatron(tmp_path / "megatron", DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        actual, expected = (tmp_path / f"{name}{suffix}" for name in ("ee_llm", "megatron"))
        assert actual.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("dtype", TYPES)
def test_megatron_reads_our_files(tmp_path: Path, dtype: type):
    write(tmp_path / "ee_llm", DOCUMENTS, dtype)
    dataset = IndexedDataset(str(tmp_path / "ee_llm"))
    assert dataset.index.dtype is dtype
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", TYPES)
def test_reads_files_of_megatron(tmp_path: Path, dtype: type):
    write_with_megatron(tmp_path / "megatron", DOCUMENTS, dtype)
    data = IndexedTokens(tmp_path / "megatron")
    assert data.dtype == dtype
    assert read_documents(tmp_path / "megatron") == DOCUMENTS
    assert data.tokens.tolist() == sum(DOCUMENTS, [])
    assert data.num_tokens == 9


def test_documents_of_several_sequences(tmp_path: Path):
    """In Megatron's sentence-split data, a document consists of several sequences."""
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
    """Documents read back equal those added, one or several at a time."""
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


def test_files_are_unchanged_without_commit(tmp_path: Path):
    write(tmp_path / "a", [[1, 2, 3]])
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([9] * 100)
    with pytest.raises(ValueError, match="do not fit into uint16"):
        write(tmp_path / "a", [[8] * 100, [-1]])
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    assert IndexedTokens(tmp_path / "a").tokens.tolist() == [1, 2, 3]


def test_full_disk_keeps_the_existing_data(tmp_path: Path):
    """A limit on the file size simulates a full disk: the same call fails in the same way."""
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


def test_interrupted_replacement_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the two renames there must be no index, instead of the old index with new tokens.

    Both have the same size here, so that no other check would fail.
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
        pytest.raises(ValueError, match=r"token ids 5 to 65536 do not fit into uint16 in .*a\.bin"),
    ):
        writer.add([65536, 5])


def test_unsupported_token_type(tmp_path: Path):
    with pytest.raises(ValueError, match="stored as float32.*uint8, int8"):
        IndexedWriter(tmp_path / "a", np.float32)


def patched(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


HEAD = 34  # size of the header in bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i, b: i.unlink(), r"a\.idx does not exist.*'ee-llm data prepare'"),
        (lambda i, b: b.unlink(), r"a\.bin does not exist"),
        (lambda i, b: i.write_bytes(b""), r"a\.idx is not a Megatron index"),
        (lambda i, b: i.write_bytes(b"MMIDIDX"), r"a\.idx is truncated.* 34"),
        (lambda i, b: i.write_bytes(b"PK\3\4" * 20), r"a\.idx is not a Megatron index.* b'PK"),
        (lambda i, b: patched(i, 9, b"\2"), r"a\.idx has version 2 .* version 1"),
        (lambda i, b: patched(i, 17, b"\7"), r"a\.idx .* code 7.* uint8"),
        (lambda i, b: patched(i, 17, b"\4"), r"a\.idx is damaged: .*not contiguous"),
        (lambda i, b: i.write_bytes(i.read_bytes()[:-8]), r"a\.idx has 114 bytes instead of 122"),
        (lambda i, b: i.write_bytes(i.read_bytes() + bytes(4)), "Sequence modes of multimodal"),
        (lambda i, b: patched(i, HEAD, b"\1"), r"a\.idx is damaged: .*not contiguous"),
        (lambda i, b: patched(i, 122 - 8, b"\3"), r"a\.idx is damaged .*document bounds .* 0 to 4"),
        (lambda i, b: patched(i, 122 - 40, b"\1"), r"a\.idx is damaged .*bounds .* 0 to 4"),
        (lambda i, b: b.write_bytes(b.read_bytes()[:-1]), r"a\.bin has 17 bytes.* expects 18"),
        (lambda i, b: b.write_bytes(b.read_bytes() * 2), r"a\.bin has 36 bytes.* expects 18"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, damage: Any, message: str):
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
    with pytest.raises(ValueError, match=r"a\.bin has no tokens"):
        IndexedTokens(tmp_path / "a")


def test_prefix_with_the_suffix(tmp_path: Path):
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(ValueError, match=r"prefix without \.bin or \.idx"):
        IndexedTokens(tmp_path / "a.bin")
