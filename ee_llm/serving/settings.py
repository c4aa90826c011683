"""Settings of the HTTP server."""

from dataclasses import dataclass, fields
from pathlib import Path

from ee_llm.errors import RequestError
from ee_llm.inference.sampling.plain_numbers import plain_float

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the HTTP server allows.

    Attributes:
        model_name: Name of the model in requests and responses.
        api_keys: Keys of which requests must have one; empty if everybody may send requests.
        max_queued_requests: Maximum number of unfinished sequences beyond those that the engine
            runs at a time. Further requests get status 429.
        max_queued_tokens: Maximum number of prompt tokens of sequences without a first token.
        max_body_mib: Maximum size of a request's body, in MiB.
        request_timeout_s: Maximum number of seconds from a request to the end of its response.
        body_timeout_s: Maximum number of seconds to wait for a request's body.
        stall_timeout_s: The server is not ready if a step of the engine takes this many seconds.
        limits: File with the operator's limits of exits and strategies; None for no limits.
        limits_key_file: File with the key of the limits' signature; None if they are not signed.
        audit_log: File that records what the limits change or refuse.
        log_requests: Log a line for each request, without its text.
        page: Serve the page at `/`.

    Raises:
        RequestError: A value is not allowed.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_queued_requests: int = 256
    max_queued_tokens: int = 262_144
    max_body_mib: float = 4.0
    request_timeout_s: float = 600.0
    body_timeout_s: float = 30.0
    stall_timeout_s: float = 120.0
    limits: Path | None = None
    limits_key_file: Path | None = None
    audit_log: Path | None = None
    log_requests: bool = True
    page: bool = True

    def __post_init__(self) -> None:
        if not self.model_name:
            raise RequestError("model_name is empty. Give the name that requests use.")
        for name in ("limits_key_file", "audit_log"):
            if getattr(self, name) is not None and self.limits is None:
                raise RequestError(f"{name} has no effect without limits. Give a file of limits.")
        for name in ("max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RequestError(f"{name} = {value!r} must be an integer of at least 1")
        for field in fields(self):
            if not field.name.endswith(("_s", "_mib")):
                continue
            number = plain_float(getattr(self, field.name))
            if number is None or not 0 < number <= 10**6:  # NaN fails too
                raise RequestError(
                    f"{field.name} = {getattr(self, field.name)!r} must be a number above 0 and at"
                    f" most {10**6}"
                )

    @property
    def max_body_bytes(self) -> int:
        """Maximum number of bytes of a request's body."""
        return int(self.max_body_mib * MIB)
