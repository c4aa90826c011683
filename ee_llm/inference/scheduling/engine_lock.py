"""The lock of an engine: one thread at a time changes its state, and threads take turns."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Pause after a step while other threads wait, which would otherwise seldom get the lock.
_TURN_S = 1e-4


class EngineLock:
    """A reentrant lock that calls a function before it is released."""

    def __init__(self, before_release: Callable[[], None]) -> None:
        """Create the lock; the outermost holder calls `before_release` at its end."""
        self._before_release = before_release
        self._lock = threading.RLock()
        self._is_held = False  # by the outermost holder, which may be interrupted anywhere
        self._waiting: deque[None] = deque()  # an entry for each thread that waits

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock."""
        self._waiting.append(None)
        is_waiting = True
        try:
            with self._lock:
                self._waiting.pop()
                is_waiting = False
                was_held, self._is_held = self._is_held, True
                try:
                    yield
                finally:
                    try:
                        if not was_held:
                            self._before_release()
                    finally:
                        self._is_held = was_held
        finally:
            if is_waiting:
                self._waiting.pop()

    def run_if_free(self) -> None:
        """Call `before_release`, unless a thread holds the lock: then that thread will call it."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._is_held:
                    with self.held():
                        pass
            finally:
                self._lock.release()

    def let_others_run(self) -> None:
        """Let a waiting thread, if there is one, take the lock; call this without holding it."""
        if self._waiting:
            time.sleep(_TURN_S)
