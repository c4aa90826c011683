"""Whether a process that a test has started is gone at its end."""

import os
import signal
import time
from pathlib import Path


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, within a few seconds."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False
