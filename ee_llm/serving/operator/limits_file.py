"""The file of the operator's limits (`--limits`), and its signature."""

import hashlib
import hmac
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ee_llm.errors import RequestError
from ee_llm.inference.choices import Measure
from ee_llm.inference.strategies import STRATEGIES, Strategy
from ee_llm.inference.text.json_lines import parse_object
from ee_llm.serving.protocol.errors import from_validation

_MAX_FILE = 2**20  # bytes
_MIN_KEY = 16  # bytes; shorter keys can be guessed

_Boundary = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]
_Floor = Annotated[float, Field(gt=0.0, le=1.0)]
_Stat = tuple[int, int, int]


class Limits(BaseModel):
    """What requests may choose; unknown fields are refused. Without a field, anything is allowed.

    Exits that are off are always allowed, since they only make answers better.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    min_thresholds: _Floor | dict[_Boundary, _Floor] | None = None
    """Least threshold in (0, 1] for all exits, or by exit, {"8": 0.9}; then every exit that is
    allowed needs one. It also applies to draft_threshold."""

    allowed_exits: list[Annotated[int, Field(ge=0)]] | None = None
    """Exits that tokens may take, and that may draft."""

    allowed_measures: Annotated[list[Measure], Field(min_length=1)] | None = None
    """Measures of confidence of thresholds. With min_thresholds, only the measure of the server's
    own policy by default, since thresholds by different measures cannot be compared."""

    allowed_strategies: Annotated[list[Strategy], Field(min_length=1)] = list(STRATEGIES)
    """Decoding strategies, among them "exact" or "full", which is used in place of others."""

    on_violation: Literal["clamp", "refuse"] = "clamp"
    """Serve requests beyond the limits within them, or refuse them."""

    @field_validator("allowed_strategies")
    @classmethod
    def _check_strategies(cls, given: list[Strategy]) -> list[Strategy]:
        if not {"exact", "full"} & set(given):
            raise ValueError(
                "needs 'exact' or 'full', which replaces strategies that are not allowed"
            )
        return given

    @property
    def default_strategy(self) -> Strategy:
        """Strategy of requests without one, and in place of those that are not allowed."""
        return "exact" if "exact" in self.allowed_strategies else "full"

    def floor(self, boundary: int) -> float | None:
        """Return the least threshold of the exit at `boundary`; None if there is none."""
        if isinstance(self.min_thresholds, dict):
            return self.min_thresholds.get(str(boundary))
        return self.min_thresholds

    def allows_exit(self, boundary: int) -> bool:
        """Return whether tokens may exit at `boundary`."""
        return self.allowed_exits is None or boundary in self.allowed_exits


class LimitsFile:
    """A file with limits, which is signed if there is a key.

    The signature is HMAC-SHA256 of the file's bytes in hexadecimal digits, in a second file whose
    name ends with .sig.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, key_file: Path | None) -> None:
        """Read the key; raises RequestError if that is not possible."""
        self.path = path
        self._key = None if key_file is None else read_limits_key(key_file)

    def state(self) -> tuple[_Stat | None, ...]:
        """Return what changes when someone changes the file or its signature."""
        paths = [self.path] if self._key is None else [self.path, signature_path(self.path)]
        return tuple(map(_stat, paths))

    def read(self) -> Limits:
        """Return the limits.

        Raises RequestError if the file cannot be read, is not valid, or is not signed with the key.
        """
        source = f"--limits {self.path}"
        content = _read(self.path, source)
        if self._key is not None:
            _check_signature(content, self.path, self._key)
        return parse_limits(content, source)


def parse_limits(content: bytes, source: str) -> Limits:
    """Return the limits in a file's content; raises RequestError, with the file's name `source`."""
    found = parse_object(content, source)
    try:
        return Limits.model_validate(found)
    except ValidationError as error:
        raise RequestError(f"{source}: {from_validation(error, found).message}") from None


def sign_limits(path: Path, key_file: Path) -> str:
    """Return the signature of a file of limits, which must be valid.

    Raises RequestError if the file or the key cannot be read, or the limits are not valid.
    """
    key = read_limits_key(key_file)
    content = _read(path, str(path))
    parse_limits(content, str(path))
    return _sign(content, key)


def signature_path(path: Path) -> Path:
    """Return the file with the signature of a file."""
    return path.with_name(f"{path.name}.sig")


def read_limits_key(path: Path) -> bytes:
    """Return the key in a file, without surrounding white space.

    Raises RequestError if it cannot be read, or is too short.
    """
    source = f"--limits-key-file {path}"
    key = _read(path, source).strip()
    if len(key) < _MIN_KEY:
        raise RequestError(
            f"{source}: the key must have at least {_MIN_KEY} bytes. Use the output of 'openssl"
            " rand -hex 32'."
        )
    return key


def _check_signature(content: bytes, path: Path, key: bytes) -> None:
    signature = signature_path(path)
    advice = f"Run 'ee-llm sign-limits {path}' with the key after you have checked the limits."
    if _stat(signature) is None:
        raise RequestError(f"--limits {path} is not signed: there is no {signature}. {advice}")
    given = _read(signature, f"Signature {signature}").strip().lower()
    if not hmac.compare_digest(given, _sign(content, key).encode()):
        raise RequestError(
            f"--limits {path}: the signature in {signature} is not that of this content and key."
            f" The limits may have been altered. {advice}"
        )


def _sign(content: bytes, key: bytes) -> str:
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _read(path: Path, source: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror or error}.") from None
    if len(content) > _MAX_FILE:
        raise RequestError(f"{source} is larger than {_MAX_FILE // 2**20} MiB.")
    return content


def _stat(path: Path) -> _Stat | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
