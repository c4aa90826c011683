"""Limits on how much work the server accepts at a time."""

from typing import Self

from ee_llm.serving.protocol.errors import ApiError

RETRY_AFTER_S = 1
"""Seconds after which a client should repeat a request that the server was too busy for."""

BYTES_PER_TOKEN = 4
"""Bytes of a body per prompt token, to estimate the tokens before they are counted."""

BODIES_AT_A_TIME = 16
"""Number of bodies of maximum size whose bytes may wait for the rest of their bodies."""


class Admission:
    """Counts the sequences and the waiting prompt tokens of all requests, and refuses more.

    A request counts once its body is complete. Until then only its bytes do, as they arrive, so
    that slow uploads do not keep other requests out.

    Attributes:
        max_sequences: Maximum number of unfinished sequences.
        max_tokens: Maximum number of prompt tokens of sequences without a first token. A request
            that is alone is admitted however long it is; if it is longer, it counts as half of
            them, so that others are not refused while it waits.
        max_bytes: Maximum number of bytes of bodies that are not complete.
        num_requests: Number of HTTP requests without a complete response.
        num_sequences: Number of unfinished sequences.
        num_tokens: Number of prompt tokens of sequences without a first token.
        num_bytes: Number of bytes of bodies that are not complete.
    """

    def __init__(self, max_sequences: int, max_tokens: int, max_bytes: int) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.max_bytes = max_bytes
        self.num_requests = 0
        self.num_sequences = 0
        self.num_tokens = 0
        self.num_bytes = 0

    def reserve(self) -> "Reservation":
        """Return a reservation without a share; raises ApiError (429) if no sequence has place."""
        reservation = Reservation(self)
        reservation.check_sequences(1)
        self.num_requests += 1
        return reservation


class Reservation:
    """The share of one HTTP request in the limits, until it is closed."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_sequences = 0
        self._num_tokens = 0
        self._num_bytes = 0

    def receive(self, num_bytes: int) -> None:
        """Count bytes of the body; raises ApiError (429) if there is no place for them."""
        limits = self._admission
        others = limits.num_bytes - self._num_bytes
        if others and limits.num_bytes + num_bytes > limits.max_bytes:
            raise _too_busy(
                f"{others} bytes of other bodies are not complete, of at most {limits.max_bytes}"
            )
        self._set_bytes(self._num_bytes + num_bytes)

    def complete(self) -> None:
        """Take a share for one sequence with a prompt of about the body's size, now complete.

        Raises ApiError (429) if there is no place.
        """
        num_bytes = self._num_bytes
        self._set_bytes(0)
        self.resize(1, num_bytes // BYTES_PER_TOKEN)

    def check_sequences(self, num_sequences: int) -> None:
        """Raise ApiError (429, or 400 if there never is) if there is no place for sequences."""
        limits = self._admission
        others = limits.num_sequences - self._num_sequences
        if others + num_sequences <= limits.max_sequences:
            return
        if num_sequences > limits.max_sequences:
            raise ApiError(
                400,
                f"The request has {num_sequences} choices, but the server allows"
                f" {limits.max_sequences} at a time. Ask for fewer.",
                param="n",
                code="invalid_value",
            )
        raise _too_busy(f"{others} sequences are unfinished, of at most {limits.max_sequences}")

    def resize(self, num_sequences: int, num_tokens: int) -> None:
        """Replace the share by another one; raises ApiError (429) if there is no place for it."""
        limits = self._admission
        self.check_sequences(num_sequences)
        waiting = limits.num_tokens - self._num_tokens
        if waiting and waiting + num_tokens > limits.max_tokens:
            raise _too_busy(f"{waiting} prompt tokens are waiting, of at most {limits.max_tokens}")
        if num_tokens > limits.max_tokens:
            num_tokens = limits.max_tokens // 2
        self._set(num_sequences, num_tokens)

    def release(self, num_sequences: int, num_tokens: int) -> None:
        """Release a part of the share, or what is left of it."""
        self._set(
            max(0, self._num_sequences - num_sequences), max(0, self._num_tokens - num_tokens)
        )

    def close(self) -> None:
        """Release everything; call this once."""
        self._set(0, 0)
        self._set_bytes(0)
        self._admission.num_requests -= 1

    def _set(self, num_sequences: int, num_tokens: int) -> None:
        self._admission.num_sequences += num_sequences - self._num_sequences
        self._admission.num_tokens += num_tokens - self._num_tokens
        self._num_sequences, self._num_tokens = num_sequences, num_tokens

    def _set_bytes(self, num_bytes: int) -> None:
        self._admission.num_bytes += num_bytes - self._num_bytes
        self._num_bytes = num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Place:
    """The share of one sequence."""

    def __init__(self, reservation: Reservation, num_tokens: int) -> None:
        self._reservation = reservation
        self._num_tokens = num_tokens
        self._is_held = True

    def started(self) -> None:
        """Release the prompt tokens: the sequence has a token."""
        self._reservation.release(0, self._num_tokens)
        self._num_tokens = 0

    def ended(self) -> None:
        """Release everything: the sequence is finished, failed or aborted."""
        self.started()
        self._reservation.release(int(self._is_held), 0)
        self._is_held = False


def _too_busy(reason: str) -> ApiError:
    return ApiError(
        429,
        f"The server is too busy: {reason}. Repeat the request later.",
        code="server_busy",
        headers={"retry-after": str(RETRY_AFTER_S)},
    )
