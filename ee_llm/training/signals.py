"""Signals as requests to stop: the current step is finished and saved before the run ends."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ee_llm import distributed
from ee_llm.launch.rank import REPEAT_S, STOP_SIGNALS


class StopSignals:
    """Within `with`, notes the first of STOP_SIGNALS instead of dying of it.

    Another one, later than `REPEAT_S`, has its usual effect: it ends the run at once. SIGHUP stays
    ignored where it is (nohup). Outside of the main thread, where Python allows no handlers,
    nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal that asks to stop, 0 while there is none."""
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._note)
                for number in STOP_SIGNALS
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
            }
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
            if distributed.is_rank_zero():
                name = signal.Signals(number).name
                text = f"{name}: finishing the step, then saving; again to end now\n"
                # Not through the console: a handler may interrupt the console itself.
                with contextlib.suppress(OSError):  # the terminal may be what was lost
                    os.write(2, text.encode())
        elif time.monotonic() - self._since > REPEAT_S[number]:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
