"""API keys: who may send requests."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from ee_llm.errors import RequestError

_MAX_FILE = 2**20  # bytes
_MIN_LENGTH = 16  # characters; shorter keys can be guessed


class ApiKeys:
    """Keys of which a request must have one; without keys, every request is allowed."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: str) -> bool:
        """Return whether the value of an Authorization header has a key.

        The time does not depend on how much of a key is right.
        """
        if not self._digests:
            return True
        scheme, key = _parts(authorization)
        given = _digest(key)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches) and scheme == "bearer"

    def key_id(self, authorization: str) -> str | None:
        """Return a digest that names the key of an allowed request; None if there are no keys."""
        return _digest(_parts(authorization)[1]).hex()[:16] if self._digests else None


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in a file, one per line; blank lines and lines that begin with # have none.

    Raises RequestError if the file cannot be read, has no key, or has a key that is too short.
    """
    source = f"--api-key-file {path}"
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE).decode()
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise RequestError(f"{source} is not a text file in UTF-8.") from None
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not re.fullmatch(rf"[!-~]{{{_MIN_LENGTH},}}", key):  # The key itself stays secret.
            raise RequestError(
                f"{source}, line {number}: a key must have at least {_MIN_LENGTH} printable ASCII"
                " characters without spaces. Use the output of 'openssl rand -hex 32'."
            )
        keys.append(key)
    if not keys:
        raise RequestError(f"{source} has no key. Write one key per line.")
    return tuple(keys)


def _parts(authorization: str) -> tuple[str, str]:
    scheme, _, key = authorization.partition(" ")
    return scheme.lower(), key.strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
