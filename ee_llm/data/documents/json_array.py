"""Read the objects of a JSON array one at a time."""

import codecs
import json
from collections.abc import Iterator

from ee_llm.data.documents.compression import Input
from ee_llm.errors import DataError

_CHUNK = 1 << 20  # bytes to read at a time
_WHITESPACE = " \t\n\r"


def objects(file: Input, max_size: int) -> Iterator[bytes]:
    """Yield each object of the array in `file` as UTF-8 text.

    Raises:
        DataError: The file is not an array of objects, or an object has more than `max_size` bytes.
            The message names the file and the record.
    """
    text = _Text(file, max_size)
    try:
        if text.take() != "[":
            raise _ArrayError("not a JSON array of objects")
        delimiter = text.take() if text.peek() == "]" else ","
        while delimiter == ",":
            text.number += 1
            yield text.take_object()
            delimiter = text.take()
        if delimiter != "]":
            raise _ArrayError(f"expected , or ] after the record, found {delimiter!r}")
        if extra := text.take():
            raise _ArrayError(f"expected the end of the file after the array, found {extra!r}")
    except _ArrayError as error:
        raise DataError(f"{file.path}, record {text.number}: {error}") from error.__cause__


class _ArrayError(Exception):
    """The text is not an array of objects; the message has the reason."""


class _Text:
    """The text of a file, read on demand."""

    def __init__(self, file: Input, max_size: int) -> None:
        self.number = 0
        """Number of the current record, from 1."""
        self._file = file
        self._max_size = max_size
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._is_read = False

    def peek(self) -> str:
        """Return the next character that is not whitespace, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _WHITESPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self) -> str:
        """Return and consume the next character that is not whitespace, "" at the end."""
        character = self.peek()
        self._at += len(character)
        return character

    def take_object(self) -> bytes:
        """Return and consume the next value, which must be an object."""
        if (character := self.peek()) != "{":
            raise _ArrayError(f"expected a JSON object, found {character!r}")
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self._text, self._at)
            except RecursionError as error:
                raise _ArrayError("not valid JSON: nested too deeply") from error
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > self._max_size:
                    raise _ArrayError(
                        f"not valid JSON, or larger than {self._max_size:,} bytes"
                    ) from error
                if not self._read():
                    raise _ArrayError(f"not valid JSON: {error.msg}") from error
                continue
            data = self._text[self._at : end].encode()
            self._at = end
            return data

    def _read(self) -> bool:
        """Read more text; return whether there was any.

        Double the amount of unparsed text, so that a long object is parsed only a few times.
        """
        if self._is_read:
            return False
        rest = self._text[self._at :]
        data = self._file.read(max(_CHUNK, len(rest)))
        self._is_read = not data
        try:
            self._text = rest + self._decoder.decode(data, final=self._is_read)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise DataError(
                f"{self._file.path}: not UTF-8 text, {byte}. Convert the file or exclude it."
            ) from error
        self._at = 0
        return True
