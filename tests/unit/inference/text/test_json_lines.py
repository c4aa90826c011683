"""Test files of one JSON object per line, and errors that name the line."""

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ee_llm.inference.text import json_lines
from ee_llm.inference.text.json_lines import opened, parse_object, read_objects, short


def _objects(data: bytes, **scheduler_config: float) -> list[tuple[str, dict[str, object]]]:
    return list(read_objects(io.BytesIO(data), "file", **scheduler_config))


def test_a_byte_order_mark_is_skipped() -> None:
    """Editors on Windows write one at the start. Elsewhere in a file it is an error."""
    assert _objects(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}') == [
        ("file, line 1", {"a": 1}),
        ("file, line 2", {"a": 2}),
    ]
    with pytest.raises(ValueError, match="file, line 2 is not valid JSON"):
        _objects(b'{"a": 1}\n\xef\xbb\xbf{"a": 2}')


def test_each_object_has_its_line_number() -> None:
    data = '{"a": 1}\n\n \t\r\n{"b": "é"}\r\n{}'.encode()
    assert _objects(data) == [
        ("file, line 1", {"a": 1}),
        ("file, line 4", {"b": "é"}),
        ("file, line 5", {}),
    ]
    assert _objects(b"") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"hello", "file, line 2 is not valid JSON: Expecting value"),
        (b'{"a": 1', "file, line 2 is not valid JSON"),
        (b'{"a": 1} {"b": 2}', "file, line 2 is not valid JSON: Extra data"),
        (b"\xef\xbb\xbf{}", "file, line 2 is not valid JSON: Unexpected UTF-8 BOM"),
        (b"[1]", r"file, line 2 is \[1\]"),
        (b'"' + 9_999 * b"x" + b'"', "file, line 2 is 'x{59}\\.\\.\\."),
        (b'{"a": 1, "a": 2}', "file, line 2 has the key 'a' twice"),
        (b'{"a": {"b": 1, "b": 2}}', "file, line 2 has the key 'b' twice"),
        (b'{"a": "\xff"}', "file, line 2 is not UTF-8 at byte 7"),
        (b"[" * 200_000, "file, line 2 is nested too deeply"),
        (b'{"a":' * 200_000, "file, line 2 is nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "file, line 2: .*digits"),
    ],
)
def test_the_error_names_an_invalid_line(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _objects(b"{}\n" + line)


def test_a_line_or_file_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE", 8)
    assert len(_objects(b'{"a":1}\n{"a":1}\n', max_size=16)) == 2
    with pytest.raises(ValueError, match="file, line 2 is longer than 0 MiB"):
        _objects(b'{}\n{"a": 1}\n')
    with pytest.raises(ValueError, match=r"file is larger than .* MiB"):
        _objects(b"{}\n" * 6, max_size=16)


def test_endless_files_are_refused_with_little_memory() -> None:
    """An endless file of zeros takes at most six times the memory of the longest line."""
    code = (
        "from pathlib import Path; from ee_llm.inference.text.json_lines import *\n"
        "with opened(Path('/dev/zero'), 'zeros') as file: list(read_objects(file, 'zeros'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (200 * 2**20,) * 2),
    )
    assert (
        done.stderr.splitlines()[-1]
        == "ee_llm.errors.RequestError: zeros, line 1 is longer than 32 MiB."
    )


def test_the_error_names_an_unreadable_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with (
            pytest.raises(ValueError, match=f"--x {path} cannot be read"),
            opened(path, f"--x {path}"),
        ):
            pass


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    with opened(Path("-"), "standard input") as file:
        assert file.read() == b"{}"


def test_errors_show_the_beginning_of_a_value() -> None:
    assert short("a") == "'a'"
    assert len(short(list(range(1000)))) == 63
    assert parse_object(b'{"x": [1, {"y": null}]}', "here") == {"x": [1, {"y": None}]}
