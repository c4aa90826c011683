"""Signals that stop training: the run finishes its step and saves before it ends."""

import contextlib
import os
import signal

from ee_llm import distributed
from ee_llm.launch.signals import StopSignalHandler


class StopSignals(StopSignalHandler):
    """Record the first stop signal for the training loop to check.

    A repeated signal has its usual effect: it ends the run at once.
    """

    def on_first(self, number: int) -> None:
        """Print, on rank 0, what the run does now."""
        if distributed.is_rank_zero():
            name = signal.Signals(number).name
            text = f"{name}: finishing the step, then saving; again to end now\n"
            # The signal may interrupt the console itself, so this bypasses it.
            with contextlib.suppress(OSError):  # standard error may be the lost terminal
                os.write(2, text.encode())

    def on_repeat(self, number: int) -> None:
        """Let the signal have its usual effect."""
        self.restore()
        signal.raise_signal(number)
