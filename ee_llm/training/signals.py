"""SIGTERM and SIGINT as requests: the step at hand is finished and saved before the run ends."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ee_llm import platform

# SIGTERM is what SLURM and Kubernetes send some time before they kill; SIGINT is Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes a signal on that the ranks may have got themselves: that is one request.
_REPEAT_S = 1.0


class StopSignals:
    """Within `with`, notes the first of the signals instead of dying of it.

    One more, a second or later, acts as it did before: for who can not wait. Outside of the main
    thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal that asks to stop, 0 while there is none."""
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            self._since = time.monotonic()
            if platform.is_rank_zero():
                name = signal.Signals(number).name
                # Not through the console: a handler may interrupt the console itself.
                os.write(2, f"{name}: finishing the step, then saving; again to end now\n".encode())
        elif time.monotonic() - self._since > _REPEAT_S:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
