"""This process as a rank that a launcher started: what it tells its launcher, and its user."""

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import NamedTuple

# In the environment of a rank that `launch` starts: the launcher's process id, and the descriptor
# that takes the rank's report.
_LAUNCHED = "EE_LLM_LAUNCHED"
_MAX_BYTES = 10_000  # of a message: escaped, it must fit into a pipe that nobody reads yet

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Requests to stop: from SLURM and Kubernetes, from Ctrl-C, and from a lost terminal."""

REPEAT_S: dict[int, float] = {signal.SIGINT: 1.0, signal.SIGTERM: 10.0, signal.SIGHUP: 10.0}
"""Seconds after the first signal from which another one of this kind is a request to end at once.

SLURM signals every process of a job, and launchers pass on what they get, perhaps late on a busy
node: that is one request. People press Ctrl-C twice within a few seconds.
"""


class Report(NamedTuple):
    """What a rank says about its end: an error for the user, or the signal that it stopped for."""

    message: str = ""
    stopped_by: int = 0


def launched_environment(descriptor: int) -> dict[str, str]:
    """Return the variables that make a process a rank of this one, reporting to `descriptor`."""
    return {_LAUNCHED: f"{os.getpid()} {descriptor}"}


def is_launched() -> bool:
    """Return whether this process is a rank that `launch` started."""
    return _LAUNCHED in os.environ


def die_with_launcher() -> None:
    """Let the kernel kill this process, if it is a rank, when its launcher dies. Linux only."""
    if not is_launched() and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG of sys/prctl.h
    if is_launched() and os.getppid() != int(os.environ[_LAUNCHED].split()[0]):
        os.kill(os.getpid(), signal.SIGKILL)  # the launcher died before


def report(message: str) -> None:
    """Say what went wrong: to the launcher, if there is one that prints it, else to the user."""
    # The name of a file may hold bytes that are no text.
    data = message.encode(errors="backslashreplace")[:_MAX_BYTES]
    if not _send(Report(message=data.decode(errors="ignore"))):
        complain(message)


def report_stopped(number: int) -> None:
    """Tell the launcher, if there is one, that this rank stopped in order because of a signal."""
    _send(Report(stopped_by=number))


def parse_report(data: bytes) -> Report:
    """Return the report in what a rank sent; an empty one if it sent none, or only a part."""
    with contextlib.suppress(ValueError, TypeError):
        return Report(**json.loads(data))
    return Report()


def complain(message: str) -> None:
    """Print one line about what went wrong, in red at a terminal."""
    is_colored = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    line = f"ee-llm: {message}"
    print(f"\033[31m{line}\033[0m" if is_colored else line, file=sys.stderr, flush=True)


def _send(content: Report) -> bool:
    if not is_launched():
        return False
    try:
        os.write(int(os.environ[_LAUNCHED].split()[1]), json.dumps(content._asdict()).encode())
    except OSError:
        return False
    return True
