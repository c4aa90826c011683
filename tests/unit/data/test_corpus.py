"""Reading documents: what is found, in which order, and what is said of bad input."""

import os
from pathlib import Path

import pytest

from ee_llm.data.corpus import RawDocument, decode_document, find_sources, raw_documents


def texts(path: Path, key: str = "text") -> list[str]:
    return [decode_document(raw, key) for raw in raw_documents(find_sources([path]))]


def test_folder_in_order_of_paths(tmp_path: Path):
    """By path, whatever order the file system lists in; not inside the folders left out."""
    for name in ["b.py", "a/z.py", "a/b/c.py", "a/notes.txt", "a/__pycache__/x.py", "c/empty.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if "empty" in name else name)
    (tmp_path / "a-first.py").write_text("x")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    found = find_sources([tmp_path], suffixes=(".py",))
    names = [source.path.relative_to(tmp_path).as_posix() for source in found]
    assert names == ["a/b/c.py", "a/z.py", "a-first.py", "b.py"]
    found = find_sources([tmp_path], suffixes=(".py", ".txt"), exclude=("b", "c"))
    names = [source.path.relative_to(tmp_path).as_posix() for source in found]
    assert names == ["a/__pycache__/x.py", "a/notes.txt", "a/z.py", "a-first.py", "b.py"]


def test_inputs_keep_their_order(tmp_path: Path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    found = find_sources([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert [source.path.name for source in found] == ["b.txt", "a.txt"]


def test_text_files_are_taken_as_they_are(tmp_path: Path):
    """No translation of line ends and no stripping: a document is its bytes."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf one\r\n\ttwo \n\n")
    assert texts(path) == ["\ufeff one\r\n\ttwo \n\n"]


def test_jsonl(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one", "body": "eins"}\r\n\n'
        b'{"text": "a\\nb\\u2028\\ud83d\\ude00", "body": "\xc2\x85\xe2\x80\xa8"}\n   \n'
        b'{"body": "three", "text": ""}'
    )
    assert texts(path) == ["one", "a\nb\u2028\U0001f600", ""]
    assert texts(path, "body") == ["eins", "\x85\u2028", "three"]
    assert [raw.line for raw in raw_documents(find_sources([path]))] == [1, 3, 5]


def test_format_is_by_suffix_or_as_said(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text('{"text": "one"}\n')
    assert texts(path) == ['{"text": "one"}\n']
    (source,) = find_sources([path], file_format="jsonl")
    assert source.is_jsonl
    (tmp_path / "a.jsonl").write_text("no JSON")
    (source,) = find_sources([tmp_path / "a.jsonl"], file_format="text")
    assert not source.is_jsonl


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"input .*absent\.txt: no such file or folder"),
        ("empty.txt", b"", r"input .*empty\.txt: the file is empty"),
        ("empty.jsonl", b"", r"input .*empty\.jsonl: the file is empty"),
        ("a.txt", b"caf\xe9\n", r"a\.txt: not UTF-8 text, byte 0xe9 at offset 3; convert"),
        ("a.txt", "wide".encode("utf-16"), r"a\.txt: not UTF-8 text, byte 0xff at offset 0;"),
        (
            "a.jsonl",
            b'{"text": "fine"}\n\n{"text": "caf\xe9"}\n',
            r"a\.jsonl, line 3: not UTF-8 text, byte 0xe9 at offset 13 of the line",
        ),
        (
            "a.jsonl",
            b'{"text": "fine"}\n{"body": "x", "id": 1}\n',
            r"a\.jsonl, line 2: no key 'text' \(keys: 'body', 'id'\)",
        ),
        ("a.jsonl", b'{"text": "a"}\n{}\n', r"line 2: no key 'text' \(keys: none\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the value of 'text' is int, expected a string"),
        ("a.jsonl", b'{"text": null}', r"line 1: the value of 'text' is NoneType, expected"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "line 1: .* unpaired surrogate at character 1"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_folder_without_documents(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.md").write_text("b")
    message = r"no file that ends with \.txt or \.py with any content in this folder"
    with pytest.raises(ValueError, match=message):
        find_sources([tmp_path], suffixes=(".txt", ".py"))


def test_no_inputs():
    with pytest.raises(ValueError, match="no inputs"):
        find_sources([])


def test_neither_file_nor_folder(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(ValueError, match="pipe: neither a file nor a folder"):
        find_sources([tmp_path / "pipe"])


def test_file_that_vanishes(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    sources = find_sources([path])
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.txt: can not be read \(No such file"):
        list(raw_documents(sources))


def test_documents_are_read_one_by_one(tmp_path: Path):
    """A file of many lines must not be read ahead of its use."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100_000)
    documents = raw_documents(find_sources([path]))
    assert next(documents) == RawDocument(path, 1, b'{"text": "a"}\n')
    path.write_bytes(b"")  # nothing but a buffer's worth can come now
    assert sum(1 for _ in documents) < 50_000
