"""Signals that ask a run to stop, recorded so that the run can stop in order."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Requests to stop: from SLURM and Kubernetes, from Ctrl-C, and from a lost terminal."""

REPEAT_S: dict[int, float] = {signal.SIGINT: 1.0, signal.SIGTERM: 10.0, signal.SIGHUP: 10.0}
"""Seconds after the first signal from which another one of this kind means "stop at once".

SLURM signals every process of a job, and launchers forward the signals that they receive, late on a
busy node: these are one request. People press Ctrl-C twice within a few seconds.
"""


class StopSignalHandler:
    """A context manager that records STOP_SIGNALS instead of letting them end the process.

    `received` is the number of the first signal, 0 before it. A later signal counts as a repetition
    if more than its `REPEAT_S` have passed since the first. Subclasses override `on_first` and
    `on_repeat`. SIGHUP stays ignored where it is ignored already, as under nohup. Outside of the
    main thread Python allows no handlers, so that nothing is recorded there.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def on_first(self, number: int) -> None:
        """Handle the first signal."""

    def on_repeat(self, number: int) -> None:
        """Handle a repeated signal."""

    def restore(self) -> None:
        """Reinstall the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            self._received_at = time.monotonic()
            self.on_first(number)
        elif time.monotonic() - self._received_at > REPEAT_S[number]:
            self.on_repeat(number)
