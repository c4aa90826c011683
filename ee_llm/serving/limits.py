"""Limits on how much work the server accepts at a time."""

from types import TracebackType
from typing import Self

from ee_llm.serving.protocol.errors import ApiError

RETRY_AFTER_S = 1
"""Seconds after which a client should repeat a request that the server was too busy for."""

BYTES_PER_TOKEN = 4
"""Bytes of a body per prompt token, to estimate the tokens before they are counted."""


class Admission:
    """Counts the sequences and the waiting prompt tokens of all requests, and refuses more.

    Attributes:
        max_sequences: Maximum number of unfinished sequences.
        max_tokens: Maximum number of prompt tokens of sequences without a first token. A request
            that is alone is admitted however long it is.
        num_requests: Number of HTTP requests without a complete response.
        num_sequences: Number of unfinished sequences.
        num_tokens: Number of prompt tokens of sequences without a first token.
    """

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_sequences = 0
        self.num_tokens = 0

    def reserve(self, num_tokens: int) -> "Reservation":
        """Return a reservation for one sequence; raises ApiError (429) if there is no place."""
        reservation = Reservation(self)
        reservation.resize(1, num_tokens)
        self.num_requests += 1
        return reservation


class Reservation:
    """The share of one HTTP request in the limits, until it is closed."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_sequences = 0
        self._num_tokens = 0

    def resize(self, num_sequences: int, num_tokens: int) -> None:
        """Replace the share by another one; raises ApiError (429) if there is no place for it."""
        limits = self._admission
        others = limits.num_sequences - self._num_sequences
        if others + num_sequences > limits.max_sequences:
            if num_sequences > limits.max_sequences:
                raise ApiError(
                    400,
                    f"The request has {num_sequences} choices, but the server allows"
                    f" {limits.max_sequences} at a time. Ask for fewer.",
                    param="n",
                    code="invalid_value",
                )
            raise _too_busy(f"{others} sequences are unfinished, of at most {limits.max_sequences}")
        waiting = limits.num_tokens - self._num_tokens
        if waiting and waiting + num_tokens > limits.max_tokens:
            raise _too_busy(f"{waiting} prompt tokens are waiting, of at most {limits.max_tokens}")
        self._set(num_sequences, num_tokens)

    def start(self, num_tokens: int) -> None:
        """Release the prompt tokens of a sequence that has its first token."""
        self._set(self._num_sequences, self._num_tokens - num_tokens)

    def finish(self) -> None:
        """Release one sequence, which is finished."""
        self._set(self._num_sequences - 1, self._num_tokens)

    def close(self) -> None:
        """Release everything; call this once."""
        self._set(0, 0)
        self._admission.num_requests -= 1

    def _set(self, num_sequences: int, num_tokens: int) -> None:
        self._admission.num_sequences += num_sequences - self._num_sequences
        self._admission.num_tokens += num_tokens - self._num_tokens
        self._num_sequences, self._num_tokens = num_sequences, num_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _too_busy(reason: str) -> ApiError:
    return ApiError(
        429,
        f"The server is too busy: {reason}. Repeat the request later.",
        code="server_busy",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )
