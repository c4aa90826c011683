"""Start the ranks of a run on this machine, forward signals to them, and report failures."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ee_llm.errors import RunError, UserError
from ee_llm.launch.rank import (
    Report,
    complain,
    launched_environment,
    parse_report,
    rank_environment,
)
from ee_llm.launch.signals import StopSignalHandler

_POLL_S = 0.05
# Time for the other ranks to end after a failure. They cannot finish their step.
_GRACE_S = 10.0
# Time for the other ranks to end after one has saved its state and stopped because of a signal.
_END_S = 300.0
# A rank has the launcher's import path. `python -m` would add the working directory.
_START = """
import sys
sys.path[:] = {path!r}
try:
    from ee_llm.launch.rank import die_with_launcher
    die_with_launcher()
    from ee_llm.cli.main import main
except KeyboardInterrupt:
    sys.exit(130)  # 128 + SIGINT, as `main` does
sys.exit(main())
"""


def must_launch(num_processes: int) -> bool:
    """Return whether a command for several processes has to start them: no launcher has."""
    return num_processes > 1 and "WORLD_SIZE" not in os.environ


def launch(num_processes: int, arguments: list[str]) -> None:
    """Run `ee-llm ARGUMENTS` as `run_ranks` does, for the command line.

    Raises:
        SystemExit: A rank failed or a signal stopped the run, after one line on standard error.
    """
    outcome = run_ranks(num_processes, arguments)
    if outcome is not None:
        complain(outcome.message)
        sys.exit(outcome.status)


class Outcome(NamedTuple):
    """Why a run failed or stopped, and its exit status.

    The status is that of the first rank that failed, or 128 + the signal's number.
    """

    message: str
    status: int

    def error(self) -> UserError | RunError:
        """Return the exception for the status, as the command line would have printed it."""
        return UserError(self.message) if self.status == 2 else RunError(self.message)


def run_ranks(num_processes: int, arguments: list[str]) -> Outcome | None:
    """Run `ee-llm ARGUMENTS` in `num_processes` ranks; return None if all of them succeed.

    SIGTERM, SIGINT and SIGHUP are forwarded to the ranks, which may take as long as they need to
    finish their step and save. A repeated signal (`StopSignalHandler`) kills them. When one rank
    fails, the others are ended. Ranks are killed when this process dies.
    """
    with _StopRequests() as requests:
        # Imported here because torch is slow to import. The store runs in this process so that
        # it outlives a rank that hangs.
        from torch.distributed import TCPStore

        from ee_llm import distributed

        num_threads = max(1, distributed.num_cores() // num_processes)
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ranks: list[_Rank] = []
        try:
            for rank in range(num_processes):
                ranks.append(_Rank(rank, num_processes, store.port, arguments, num_threads))
            return _wait(ranks, requests)
        finally:
            for rank_ in ranks:
                rank_.kill()


class _StopRequests(StopSignalHandler):
    """The signals that ask the launcher to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.is_forwarded = False
        self.is_repeated = False
        """Whether to end at once."""

    def on_repeat(self, number: int) -> None:
        self.is_repeated = True


class _Rank:
    """One rank: its process, and the pipe that carries its report.

    Each rank has its own session, so that Ctrl-C at the terminal reaches only the launcher.
    """

    def __init__(
        self, rank: int, num_ranks: int, port: int, arguments: list[str], num_threads: int
    ) -> None:
        self.rank = rank
        self._report: Report | None = None
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        environment = {
            **rank_environment(rank, num_ranks, port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the launcher hosts the store
            **launched_environment(writer),
        }
        defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "OMP_NUM_THREADS": str(num_threads)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START.format(path=sys.path), *arguments],
                env=defaults | os.environ | environment,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)

    def report(self) -> Report:
        """Return the report of this rank, which has ended."""
        if self._report is None:
            try:
                self._report = parse_report(os.read(self._reader, 1 << 20))
            except BlockingIOError:  # empty, and a child process of the rank still has it open
                self._report = Report()
        return self._report

    def kill(self) -> None:
        """Kill the rank and its child processes, if it is still running."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def is_stopped(self) -> bool:
        """Return whether the process is suspended, as after SIGSTOP."""
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # the process has ended, or the system has no /proc
            return False
        return state in "tT"


def _wait(ranks: list[_Rank], requests: _StopRequests) -> Outcome | None:
    """Wait for all ranks to end. Return why the run failed or stopped, None if it succeeded."""
    running = list(ranks)
    stopped = 0
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if requests.received and not requests.is_forwarded:
            requests.is_forwarded = True
            for rank in running:
                rank.process.send_signal(requests.received)
        if requests.is_repeated:
            for rank in running:
                rank.kill()
            name = _signal_name(requests.received)
            return Outcome(f"killed by a second signal after {name}", 128 + requests.received)
        ended = [rank for rank in running if rank.process.poll() is not None]
        running = [rank for rank in running if rank not in ended]
        failed = []
        for rank in ended:
            number = _stop_signal(rank, requests.received)
            if number:
                stopped = number
                deadline = min(deadline, time.monotonic() + _END_S)
            elif rank.process.returncode:
                failed.append(rank)
        if failed:
            # A killed rank is the cause, although others may have failed because of it before.
            first = min(failed, key=lambda rank: rank.process.returncode >= 0)
            message, status = _failure(first)
            others = _end_others(running)
            return Outcome(". ".join([message.rstrip("."), *others]) if others else message, status)
    for rank in running:
        rank.kill()
    return Outcome(f"stopped by {_signal_name(stopped)}", 128 + stopped) if stopped else None


def _stop_signal(rank: _Rank, requested: int) -> int:
    """Return the signal that made a rank, which has ended, stop in order, 0 if none did."""
    report = rank.report()
    if report.stopped_by:
        return report.stopped_by
    # A signal that arrives before the rank has installed its handlers kills it.
    was_killed = requested and rank.process.returncode in (-requested, 128 + requested)
    return requested if was_killed and not report.message else 0


def _failure(rank: _Rank) -> Outcome:
    """Return the message and the status for a rank that failed."""
    status = rank.process.returncode
    if status < 0:
        name = _signal_name(-status)
        hint = ". The machine may be out of memory" if name == "SIGKILL" else ""
        return Outcome(f"rank {rank.rank} was killed by {name}{hint}", 128 - status)
    message = rank.report().message
    if status == 128 + signal.SIGINT and not message:
        return Outcome(f"rank {rank.rank} was killed by SIGINT", status)
    return Outcome(
        message or f"rank {rank.rank} exited with status {status}. See its output above", status
    )


def _end_others(running: list[_Rank]) -> list[str]:
    """Wait for the remaining ranks to end after a failure, and kill those that do not.

    A suspended process is killed at once, because it cannot notice the failure.

    Returns:
        A sentence about each rank that had to be killed.
    """
    killed = []
    deadline = time.monotonic() + _GRACE_S
    while running:
        for rank in [rank for rank in running if rank.is_stopped()]:
            killed.append(
                f"Rank {rank.rank} did not respond: its process {rank.process.pid} was suspended "
                "(SIGSTOP)"
            )
            rank.kill()
        running = [rank for rank in running if rank.process.poll() is None]
        if time.monotonic() > deadline:
            for rank in running:
                killed.append(f"Rank {rank.rank} did not end within {_GRACE_S:g} s and was killed")
                rank.kill()
            break
        time.sleep(_POLL_S)
    return killed


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"
