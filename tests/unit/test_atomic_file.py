"""Test files that are replaced atomically."""

import os
from pathlib import Path

import pytest

from ee_llm.atomic_file import AtomicFile, open_output, replace_text
from ee_llm.errors import UserError


def test_replace_text_creates_folders_and_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "latest"
    for text in ("old\n", "new é\n"):
        replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_existing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest"
    replace_text(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space.*latest"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_uncommitted_data_are_discarded(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with AtomicFile(path) as file:
        file.write(b"abc")
    assert list(tmp_path.iterdir()) == []


def test_open_output_names_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"output {tmp_path} is a folder"):
        open_output(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "data", tmp_path / "file" / "folder" / "data"):
        with pytest.raises(UserError, match=f"output {path} cannot be written: .* not a folder"):
            open_output(path)
