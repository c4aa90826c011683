"""Reading documents: files found, their order, formats, and errors for bad input."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ee_llm.data.documents import (
    compression,
    decode_document,
    describe_skipped,
    find_sources,
    json_array,
    raw_documents,
    reading,
)


def texts(path: Path, key: str = "text") -> list[str]:
    return [decode_document(raw, key) for raw in raw_documents(find_sources([path]).files, key)]


def test_folder_in_order_of_paths(tmp_path: Path):
    """Files are sorted by path, independently of the file system, without excluded folders."""
    for name in ["b.py", "a/z.py", "a/b/c.py", "a/notes.txt", "a/__pycache__/x.py", "c/empty.py"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if "empty" in name else name)
    (tmp_path / "a-first.py").write_text("x")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    sources = find_sources([tmp_path], suffixes=(".py",))
    names = [source.path.relative_to(tmp_path).as_posix() for source in sources.files]
    assert names == ["a/b/c.py", "a/z.py", "a-first.py", "b.py"]
    sources = find_sources([tmp_path], suffixes=(".py", ".txt"), exclude=("b", "c"))
    names = [source.path.relative_to(tmp_path).as_posix() for source in sources.files]
    assert names == ["a/__pycache__/x.py", "a/notes.txt", "a/z.py", "a-first.py", "b.py"]


def test_inputs_keep_their_order(tmp_path: Path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    sources = find_sources([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert [source.path.name for source in sources.files] == ["b.txt", "a.txt"]


def test_text_files_are_not_changed(tmp_path: Path):
    """Line endings are not translated and white space is not stripped."""
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
    assert [raw.number for raw in raw_documents(find_sources([path]).files)] == [1, 3, 5]


def test_format_by_suffix_or_option(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text('{"text": "one"}\n')
    assert texts(path) == ['{"text": "one"}\n']
    (source,) = find_sources([path], file_format="jsonl").files
    assert source.kind == "jsonl"
    (tmp_path / "a.jsonl").write_text("no JSON")
    (source,) = find_sources([tmp_path / "a.jsonl"], file_format="text").files
    assert source.kind == "text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, r"input .*absent\.txt: no such file or folder"),
        ("empty.txt", b"", r"input .*empty\.txt: empty"),
        ("empty.jsonl", b"", r"input .*empty\.jsonl: empty"),
        ("a.txt", b"caf\xe9\n", r"a\.txt: not UTF-8 text, byte 0xe9 at offset 3\."),
        ("a.txt", "wide".encode("utf-16"), r"a\.txt: not UTF-8 text, byte 0xff at offset 0\."),
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
        ("a.jsonl", b'{"text": 3}\n', r"line 1: the value of 'text' is int instead of a string"),
        ("a.jsonl", b'{"text": null}', r"line 1: the value of 'text' is NoneType instead of"),
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
    message = r"the folder has no file that ends with \.txt or \.py .*\(skipped: 1 empty"
    with pytest.raises(ValueError, match=message):
        find_sources([tmp_path], suffixes=(".txt", ".py"))


def test_no_inputs():
    with pytest.raises(ValueError, match="no inputs"):
        find_sources([])


def test_neither_file_nor_folder(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")  # Reading it would wait forever.
    with pytest.raises(ValueError, match="pipe: neither a file nor a folder"):
        find_sources([tmp_path / "pipe"])


def test_file_that_vanishes(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    sources = find_sources([path]).files
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: No such file"):
        list(raw_documents(sources))


def test_documents_are_read_one_by_one(tmp_path: Path):
    """A file of many lines must not be read ahead."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100_000)
    documents = raw_documents(find_sources([path]).files)
    assert next(documents) == (path, 1, b'{"text": "a"}\n', "line", 14)
    path.write_bytes(b"")  # Only buffered data can follow.
    assert sum(1 for _ in documents) < 50_000


def test_files_that_are_not_documents_are_skipped_and_reported(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "archive.gz").write_bytes(gzip.compress(b"a.txt\0\0\0"))
    (tmp_path / "utf-16").write_bytes("no mark".encode("utf-16-le"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to("folder")
    sources = find_sources([tmp_path])
    assert [source.path.name for source in sources.files] == ["a.txt"]
    assert {path.name: reason for path, reason in sources.skipped} == {
        "archive.gz": "binary",
        "empty.txt": "empty",
        "gone": "broken link",
        "image.png": "binary",
        "linked": "link to a folder",
        "pipe": "neither a file nor a folder",
        "utf-16": "binary",
    }
    text = describe_skipped(sources.skipped)
    assert f"3 binary ({tmp_path / 'archive.gz'}, ...)" in text
    assert f"1 broken link ({tmp_path / 'gone'})" in text
    for path, reason in sources.skipped:
        if reason != "link to a folder":
            with pytest.raises(ValueError, match=f"{path.name}: {reason}"):
                find_sources([path])


def test_file_given_twice_is_rejected(tmp_path: Path):
    """Otherwise it would be read twice silently."""
    path = tmp_path / "a.txt"
    path.write_text("a")
    (tmp_path / "linked").symlink_to(path)
    for inputs in ([path, path], [tmp_path, path], [path, tmp_path / "linked"]):
        with pytest.raises(ValueError, match=r"a\.txt is also in input"):
            find_sources(inputs)


RECORDS = [{"text": "one", "n": 1}, {"text": "zwölf, [x] {", "n": [{}]}, {"text": "\U0001f600"}]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_compressed_files(tmp_path: Path, suffix: str, bom: bytes):
    """Compression is detected by content. The first file has two compressed streams."""
    compress = COMPRESS[suffix]
    array = json.dumps(RECORDS, indent=1).encode()
    contents = {
        f"a.jsonl.{suffix}": compress(bom + LINES[:20]) + compress(LINES[20:]),
        f"a.json.{suffix}": compress(bom + array),
        f"b.json.{suffix}": compress(bom + LINES),
        "a.ndjson": compress(bom + LINES),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert texts(path) == TEXTS
        sources = find_sources([path]).files
        assert sources[0].is_compressed
        assert sum(raw.num_read for raw in raw_documents(sources)) <= len(content)
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(b"text\r\n"))
    assert texts(tmp_path / f"a.txt.{suffix}") == ["text\r\n"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_files(tmp_path: Path, suffix: str):
    """A truncated or changed file must not be read as a shorter text."""
    lines = b"".join(b'{"text": "%d"}\n' % (number * number) for number in range(20_000))
    content = COMPRESS[suffix](lines)
    path = tmp_path / f"a.jsonl.{suffix}"
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for damaged in (content[: len(content) * 2 // 3], bytes(changed)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            texts(path)


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.gz"])
def test_decompression_bomb_is_detected_early(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compression, "FREE_BYTES", 1 << 20)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(b" " * (128 << 20)))
    (source,) = find_sources([path]).files
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"decompresses to more than 200 times its size"):
            list(raw_documents([source]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize("suffix", [*COMPRESS, "parquet"])
def test_decompression_bombs(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compression, "FREE_BYTES", 1 << 20)
    path = tmp_path / f"a.jsonl.{suffix}"
    if suffix == "parquet":
        write_parquet(path, {"text": ["a" * 2000] * 5000})
    else:
        path.write_bytes(COMPRESS[suffix]((b'{"text": "%s"}\n' % (b"a" * 2000)) * 5000))
    with pytest.raises(ValueError, match=r"decompresses to more than 200 times its size"):
        texts(path)


def test_documents_have_a_maximum_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 1000)
    (tmp_path / "a.txt").write_text("a" * 1001)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 1001))
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}' % ("a" * 1001))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{path.name}.* more than 1,000 bytes"):
            texts(path)
    array = tmp_path / "a.json"
    array.write_text('[{"text": "%s"' % ("a" * 5_000_000))
    with pytest.raises(
        ValueError, match=r"a\.json, record 1: not valid JSON, or larger than 1,000"
    ):
        texts(array)


def test_format_of_json_by_content(tmp_path: Path):
    """A .json file is an array of objects, JSONL, or otherwise plain text."""
    contents = {
        "array.json": (json.dumps(RECORDS), TEXTS),
        "empty-lines.json": ("\n [ \n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n", TEXTS),
        "lines.json": (LINES.decode(), TEXTS),
        "pretty.json": ('{\n "name": "x"\n}\n', ['{\n "name": "x"\n}\n']),
        "numbers.json": ("[1, 2]", ["[1, 2]"]),
    }
    for name, (content, expected) in contents.items():
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == expected
    (source,) = find_sources([tmp_path / "array.json"], file_format="text").files
    assert decode_document(*raw_documents([source])) == json.dumps(RECORDS)
    (tmp_path / "none.json").write_text("[ ]")
    (source,) = find_sources([tmp_path / "none.json"], file_format="json").files
    assert list(raw_documents([source])) == []


def test_array_is_read_object_by_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A read may end at any byte: within a character or between objects."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(RECORDS, indent=1, ensure_ascii=False), encoding="utf-8")
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(json_array, "_CHUNK", size)
        assert texts(path) == TEXTS
    monkeypatch.setattr(json_array, "_CHUNK", 1 << 16)
    path.write_text("[" + ",".join(['{"text": "a"}'] * 100_000) + "]")
    documents = raw_documents(find_sources([path]).files)
    next(documents)
    path.write_bytes(b"")  # Only buffered data can follow.
    with pytest.raises(ValueError, match=r"a\.json, record \d+: not valid JSON"):
        assert sum(1 for _ in documents) < 50_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, 3]', "record 2: expected a JSON object, found '3'"),
        ('[{"text": "a"}, ]', "record 2: expected a JSON object, found ']'"),
        ('[{"text": "a"} {"text": "b"}]', "record 1: expected , or ] after the record, found '{'"),
        ('[{"text": "a"}', "record 1: expected , or ] after the record, found ''"),
        ('[{"text": "a"}, {"te', "record 2: not valid JSON"),
        ('[{"text": "a"}] x', "record 1: expected the end of the file after the array, found 'x'"),
        (
            '[{"body": "a"}]',
            "record 1: no key 'text' (keys: 'body'). Choose one with --key",
        ),
        ("[" + '{"text": ' * 100_000, "record 1: not valid JSON: nested too deeply"),
    ],
)
def test_invalid_arrays(tmp_path: Path, content: str | bytes, message: str):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
        texts(path)


def test_array_that_is_not_utf_8(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "caf\xe9"}]')
    with pytest.raises(ValueError, match=r"a\.json: not UTF-8 text, byte 0xe9"):
        texts(path)


def write_parquet(path: Path, columns: dict[str, object], **options: object) -> None:
    parquet.write_table(pyarrow.table(columns), path, **options)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_parquet(tmp_path: Path, kind: object, as_dictionary: bool):
    """Several row groups and batches; the format is detected by content."""
    values = [f"text {number}" for number in range(1000)]
    column = pyarrow.array(values, kind)
    if as_dictionary and kind == pyarrow.string():
        column = column.dictionary_encode()
    for name in ("a.parquet", "a"):
        path = tmp_path / name
        write_parquet(path, {"body": column, "n": list(range(1000))}, row_group_size=300)
        assert texts(path, "body") == values
        documents = list(raw_documents(find_sources([path]).files, "body"))
        assert sum(raw.num_read for raw in documents) == path.stat().st_size
        assert documents[-1][1] == 1000


def test_bad_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"body": ["a"], "messages": [["a"]], "text": ["a"]})
    for key, message in (
        ("x", "has no column 'x' (columns: 'body', 'messages', 'text'). Choose one with --key"),
        ("messages", "column 'messages' has type list<"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}:? {re.escape(message)}"):
            texts(path, key)
    content = path.read_bytes()
    for damaged in (content[:-20], content[:8] + b"\xff" * 40 + content[48:], b"PAR1"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"input .*a\.parquet .*damaged Parquet data"):
            texts(path, "body")
    write_parquet(path, {"text": ["a", None]})
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: the value of 'text' is null"):
        texts(path)
    # Some writers produce string columns whose bytes are not UTF-8.
    wrong = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    write_parquet(path, {"text": wrong})
    with pytest.raises(
        ValueError, match=r"row 2: not UTF-8 text, byte 0xe9 at offset 3 of the row"
    ):
        texts(path)


def test_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    (tmp_path / "a.txt.zst").write_bytes(COMPRESS["zst"](b"text"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.txt.zst"):
        with pytest.raises(ValueError, match=rf"{name} requires the package pyarrow .*pip install"):
            texts(tmp_path / name)


def test_unusual_file_names(tmp_path: Path):
    folder = tmp_path / "a folder\nwith a newline"
    folder.mkdir()
    (folder / "ein text ü.txt").write_text("text")
    assert texts(folder) == ["text"]
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")  # not UTF-8
    Path(odd).write_text("more")
    assert sorted(texts(folder)) == ["more", "text"]


def test_unreadable_files_are_reported_early(tmp_path: Path):
    if os.getuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "b.txt").chmod(0)
    with pytest.raises(ValueError, match=r"b\.txt cannot be read: Permission denied"):
        find_sources([tmp_path])
