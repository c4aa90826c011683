"""Processes on this machine: starting the ranks of a run, and one account of what went wrong."""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

# Set in the ranks that `launch` starts: their errors go to the launcher, which prints one.
_LAUNCHED = "EE_LLM_LAUNCHED"
_TOLD = "ee_llm"  # what a rank told its launcher, in its error file


def is_launched() -> bool:
    """Whether this process is a rank that `launch` started."""
    return _LAUNCHED in os.environ


def launch(num_processes: int, arguments: list[str]) -> None:
    """Run `ee-llm ARGUMENTS` in `num_processes` ranks; exits as the first rank that failed."""
    os.environ[_LAUNCHED] = "1"
    from ee_llm import platform

    num_threads = max(1, platform.num_cores() // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The launcher's accounts of a failed rank and of a signal give way to ours, below.
    elastic = "torch.distributed.elastic"
    logging.getLogger(f"{elastic}.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger(f"{elastic}.agent.server.api").setLevel(logging.ERROR)
    launcher = ["--standalone", "--nproc-per-node", str(num_processes)]
    try:
        run.run(run.parse_args([*launcher, "--module", "ee_llm.cli", *arguments]))
    except ChildFailedError as failures:
        # Who was killed is the cause, though others may have said first that they lost it. The
        # launcher itself ends ranks by SIGTERM.
        killed = [
            (rank, failure)
            for rank, failure in failures.failures.items()
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        ]
        rank, failure = killed[0] if killed else failures.get_first_failure()
        if failure.exitcode < 0:
            name = _signal_name(-failure.exitcode)
            hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
            complain(f"rank {rank} was ended by {name}{hint}")
            sys.exit(128 - failure.exitcode)
        if _TOLD in failure.error_file_data:
            complain(failure.error_file_data[_TOLD])
        else:  # it did not get to `report`
            complain(f"rank {rank} ended with status {failure.exitcode}; what it said is above")
        sys.exit(failure.exitcode)
    except SignalException as stopped:
        complain(f"stopped by {stopped.sigval.name}")
        sys.exit(128 + stopped.sigval)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def report(message: str) -> None:
    """Say what went wrong: to the launcher, if it asked for it, else to the user."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if is_launched() and error_file:
        # torch's launcher wants a message too; where there is none it makes up one.
        account = {"message": message, "timestamp": time.time(), _TOLD: message}
        Path(error_file).write_text(json.dumps(account))
    else:
        complain(message)


def complain(message: str) -> None:
    """Print one line about what went wrong, in red at a terminal."""
    is_colored = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    line = f"ee-llm: {message}"
    print(f"\033[31m{line}\033[0m" if is_colored else line, file=sys.stderr)
