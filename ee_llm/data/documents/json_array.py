"""The objects of a JSON array, of which one is in memory at a time."""

import codecs
import json
from collections.abc import Iterator

from ee_llm.data.documents.compression import Input
from ee_llm.errors import DataError

_CHUNK = 1 << 20  # bytes that are read at a time
_BLANKS = " \t\n\r"


def objects(file: Input, max_size: int) -> Iterator[bytes]:
    """Yield each object of the array that `file` holds, as UTF-8 text.

    Raises DataError, naming the file and the record, for what is no array of objects and for an
    object of more than `max_size` bytes.
    """
    text = _Text(file, max_size)
    try:
        if text.take() != "[":
            raise _ArrayError("expected a JSON array of objects")
        mark = text.take() if text.peek() == "]" else ","
        while mark == ",":
            text.number += 1
            yield text.take_object()
            mark = text.take()
        if mark != "]":
            raise _ArrayError(f"expected , or ] after it, found {mark!r}")
        if after := text.take():
            raise _ArrayError(f"expected the end of the file after the array, found {after!r}")
    except _ArrayError as error:
        raise DataError(f"{file.path}, record {text.number}: {error}") from error.__cause__


class _ArrayError(Exception):
    """The text is no array of objects; the message says why."""


class _Text:
    """A file's text, read on demand."""

    def __init__(self, file: Input, max_size: int) -> None:
        self.number = 0
        """Of the record at hand."""
        self._file = file
        self._max_size = max_size
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._is_read = False

    def peek(self) -> str:
        """Return the next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self) -> str:
        """Return the next character that is no blank and go past it."""
        found = self.peek()
        self._at += len(found)
        return found

    def take_object(self) -> bytes:
        """Return the next value, which must be an object, and go past it."""
        if (found := self.peek()) != "{":
            raise _ArrayError(f"expected a JSON object, found {found!r}")
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except RecursionError as error:
                raise _ArrayError("not valid JSON: nested too deeply") from error
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > self._max_size:
                    raise _ArrayError(
                        f"not valid JSON, or more than {self._max_size:,} bytes"
                    ) from error
                if not self._read():
                    raise _ArrayError(f"not valid JSON: {error.msg}") from error
                continue
            data = self._text[self._at : end].encode()
            self._at = end
            return data

    def _read(self) -> bool:
        """Read as much again as is kept, so that long objects are parsed few times over."""
        if self._is_read:
            return False
        kept = self._text[self._at :]
        data = self._file.read(max(_CHUNK, len(kept)))
        self._is_read = not data
        try:
            self._text = kept + self._decoder.decode(data, final=self._is_read)
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{error.object[error.start]:02x}"
            raise DataError(
                f"{self._file.path}: not UTF-8 text, {wrong}; convert the file or leave it out"
            ) from error
        self._at = 0
        return True
