"""A checkpoint stores its tokenizer and detects a different one."""

import pytest

from ee_llm.checkpoint import tokenizer
from ee_llm.errors import CheckpointError


def test_stored_file_is_the_tokenizer(tmp_path):
    source = tmp_path / "source" / "spm.model"
    source.parent.mkdir()
    source.write_bytes(b"\x00model")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    tokenizer.store(str(source), checkpoint)
    stored = tokenizer.stored(checkpoint)
    assert stored == str(checkpoint / "tokenizer" / "spm.model")
    assert tokenizer.fingerprint(stored) == tokenizer.fingerprint(str(source))
    tokenizer.check(stored, tokenizer.fingerprint(str(source)), checkpoint)


def test_a_run_keeps_its_first_tokenizer(tmp_path):
    """A save after hours must not fail or store another vocabulary because a file has changed."""
    source = tmp_path / "spm.model"
    source.write_bytes(b"first")
    tokenizer.keep(str(source))
    fingerprint = tokenizer.fingerprint(str(source))
    source.write_bytes(b"second")
    assert tokenizer.fingerprint(str(source)) == fingerprint
    source.unlink()
    (tmp_path / "checkpoint").mkdir()
    tokenizer.store(str(source), tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "tokenizer" / "spm.model").read_bytes() == b"first"


def test_the_next_run_reads_the_tokenizer_again(tmp_path):
    source = tmp_path / "spm.model"
    fingerprints = []
    for content in (b"first", b"second"):
        source.write_bytes(content)
        tokenizer.keep(str(source))
        fingerprints.append(tokenizer.fingerprint(str(source)))
    assert fingerprints[0] != fingerprints[1]


def test_the_byte_tokenizer_needs_no_file(tmp_path):
    tokenizer.store("bytes", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert tokenizer.stored(tmp_path) == "bytes"
    tokenizer.check("bytes", "bytes", tmp_path)


def test_another_tokenizer_is_an_error(tmp_path):
    first, second = tmp_path / "a.model", tmp_path / "b.model"
    first.write_bytes(b"a")
    second.write_bytes(b"b")
    expected = tokenizer.fingerprint(str(first))
    for other in (str(second), "bytes"):
        with pytest.raises(CheckpointError, match=r"is not the tokenizer .* was trained with"):
            tokenizer.check(other, expected, tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer: cannot read .*none\.model"):
        tokenizer.fingerprint(str(tmp_path / "none.model"))


def test_two_tokenizer_files_raise(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in "ab":
        (tmp_path / "tokenizer" / name).touch()
    with pytest.raises(CheckpointError, match="expected one tokenizer file, found a, b"):
        tokenizer.stored(tmp_path)
