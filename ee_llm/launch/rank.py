"""A rank's reports to the launcher that started it, and error lines for the user."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from typing import NamedTuple

# Environment variable of a rank that `launch` starts: the launcher's process id, and the file
# descriptor for the rank's report.
_LAUNCHED = "EE_LLM_LAUNCHED"
_MAX_BYTES = 10_000  # of a message: as JSON it must fit into the buffer of an unread pipe


class Report(NamedTuple):
    """Why a rank ended: an error message for the user, or the signal that stopped it in order."""

    message: str = ""
    stopped_by: int = 0


def launched_environment(descriptor: int) -> dict[str, str]:
    """Return the environment of a rank that this process starts, reporting to `descriptor`."""
    return {_LAUNCHED: f"{os.getpid()} {descriptor}"}


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return torchrun's variables for a rank on this machine, whose store is at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def is_launched() -> bool:
    """Return whether this process is a rank that `launch` started."""
    return _LAUNCHED in os.environ


def is_rank() -> bool:
    """Return whether this process is a rank that `launch` or torchrun started."""
    return is_launched() or "TORCHELASTIC_RUN_ID" in os.environ


def die_with_launcher() -> None:
    """Have the kernel kill this process, if it is a rank, when its launcher dies. Linux only."""
    if not is_rank():
        return
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG of sys/prctl.h
    if is_launched() and os.getppid() != int(os.environ[_LAUNCHED].split()[0]):
        os.kill(os.getpid(), signal.SIGKILL)  # the launcher has died already


def exit_at_end_of(descriptor: int) -> None:
    """End this process when the other end of a pipe closes, as at the death of its holder."""

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def report(message: str) -> None:
    """Report an error to the launcher, which prints it, or print it where there is no launcher."""
    # A file name in the message may contain bytes that are not valid text.
    data = message.encode(errors="backslashreplace")[:_MAX_BYTES]
    if not _send(Report(message=data.decode(errors="ignore"))):
        complain(message)


def report_stopped(number: int) -> None:
    """Report to the launcher, if there is one, that a signal stopped this rank in order."""
    _send(Report(stopped_by=number))


def parse_report(data: bytes) -> Report:
    """Return the report that a rank sent, an empty one if `data` is empty or incomplete."""
    with contextlib.suppress(ValueError, TypeError):
        return Report(**json.loads(data))
    return Report()


def complain(message: str) -> None:
    """Print an error as one line on standard error, in red on a terminal."""
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
