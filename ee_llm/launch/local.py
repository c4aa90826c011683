"""Start the ranks of a run on this machine, pass signals on to them, and report what went wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from ee_llm.launch.rank import (
    REPEAT_S,
    STOP_SIGNALS,
    Report,
    complain,
    launched_environment,
    parse_report,
)

_POLL_S = 0.05
# After a failure, how long the other ranks get to notice it and end. They cannot finish their step.
_GRACE_S = 10.0
# After a rank has stopped as a signal asked, everything is saved: how long the others get to end.
_END_S = 300.0
# A rank imports from where its launcher does: `python -m` alone would add the working directory.
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


def launch(num_processes: int, arguments: list[str]) -> None:
    """Run `ee-llm ARGUMENTS` in `num_processes` ranks and return when all of them have succeeded.

    SIGTERM, SIGINT and SIGHUP are passed on to the ranks, which may take as long as they need to
    finish their step and save; a second signal, later than `REPEAT_S`, kills them. When one rank
    fails, the others are ended. Ranks are killed when this process dies.

    Raises SystemExit, after one line on standard error, with the status of the first rank that
    failed, or 128 + the number of the signal that stopped the run.
    """
    with _StopRequests() as requests:
        # Slow to import, and this process hosts the store: a rank that hangs cannot take it along.
        from torch.distributed import TCPStore

        from ee_llm import distributed

        num_threads = max(1, distributed.num_cores() // num_processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ranks: list[_Rank] = []
        try:
            for rank in range(num_processes):
                ranks.append(_Rank(rank, num_processes, store.port, arguments))
            end = _wait(ranks, requests)
        finally:
            for rank_ in ranks:
                rank_.kill()
    if end is not None:
        complain(end.message)
        sys.exit(end.status)


class _End(NamedTuple):
    """Why a run ended, and the exit status that says so."""

    message: str
    status: int


class _StopRequests:
    """Within `with`, the signals that ask this process to stop, instead of their usual effect."""

    def __init__(self) -> None:
        self.number = 0
        """The first signal, 0 while there is none."""
        self.is_passed_on = False
        self.is_urgent = False
        """Whether a second signal came: end at once."""
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopRequests":
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started by nohup
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number = number
            self._since = time.monotonic()
        elif time.monotonic() - self._since > REPEAT_S[number]:
            self.is_urgent = True


class _Rank:
    """One rank: its process, and the pipe that its report comes through.

    Ranks have sessions of their own, so that Ctrl-C at the terminal reaches the launcher alone.
    """

    def __init__(self, rank: int, num_ranks: int, port: int, arguments: list[str]) -> None:
        self.rank = rank
        self._report: Report | None = None
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's word for "the launcher hosts it"
            **launched_environment(writer),
        }
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START.format(path=sys.path), *arguments],
                env={"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} | os.environ | environment,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)

    def report(self) -> Report:
        """Return what the rank, which has ended, said about its end."""
        if self._report is None:
            try:
                self._report = parse_report(os.read(self._reader, 1 << 20))
            except BlockingIOError:  # nothing, while a process that it left behind could write
                self._report = Report()
        return self._report

    def kill(self) -> None:
        """Kill the rank, if it is still running, and whatever it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def is_stopped(self) -> bool:
        """Return whether the process exists and does not run, as after SIGSTOP."""
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # it has ended, or this system has no such file
            return False
        return state in "tT"


def _wait(ranks: list[_Rank], requests: _StopRequests) -> _End | None:
    """Return why the run ended, None if every rank succeeded, when no rank runs any more."""
    running = list(ranks)
    stopped = 0
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if requests.number and not requests.is_passed_on:
            requests.is_passed_on = True
            for rank in running:
                rank.process.send_signal(requests.number)
        if requests.is_urgent:
            for rank in running:
                rank.kill()
            name = _signal_name(requests.number)
            return _End(f"ended at once by a signal after {name}", 128 + requests.number)
        ended = [rank for rank in running if rank.process.poll() is not None]
        running = [rank for rank in running if rank not in ended]
        failed = []
        for rank in ended:
            number = _stop_signal(rank, requests.number)
            if number:
                stopped = number
                deadline = min(deadline, time.monotonic() + _END_S)
            elif rank.process.returncode:
                failed.append(rank)
        if failed:
            # The one that was killed is the cause, although others may have noticed it already.
            first = min(failed, key=lambda rank: rank.process.returncode >= 0)
            message, status = _account(first)
            others = _end_others(running)
            return _End(". ".join([message.rstrip("."), *others]) if others else message, status)
    for rank in running:
        rank.kill()
    return _End(f"stopped by {_signal_name(stopped)}", 128 + stopped) if stopped else None


def _stop_signal(rank: _Rank, requested: int) -> int:
    """Return the signal that a rank, which has ended, stopped for as it was asked to, else 0."""
    report = rank.report()
    if report.stopped_by:
        return report.stopped_by
    # It may have been asked before it could do more than die.
    is_obeying = requested and rank.process.returncode in (-requested, 128 + requested)
    return requested if is_obeying and not report.message else 0


def _account(rank: _Rank) -> _End:
    """Return what there is to say of a rank that failed."""
    status = rank.process.returncode
    if status < 0:
        name = _signal_name(-status)
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return _End(f"rank {rank.rank} was ended by {name}{hint}", 128 - status)
    message = rank.report().message
    if status == 128 + signal.SIGINT and not message:
        return _End(f"rank {rank.rank} was ended by SIGINT", status)
    return _End(
        message or f"rank {rank.rank} ended with status {status}; its output above says why", status
    )


def _end_others(running: list[_Rank]) -> list[str]:
    """Let the ranks that are left notice a failure; say which of them had to be killed.

    A stopped process notices nothing, so that waiting for it is useless.
    """
    said = []
    deadline = time.monotonic() + _GRACE_S
    while running:
        for rank in [rank for rank in running if rank.is_stopped()]:
            said.append(
                f"Rank {rank.rank} did not answer: its process {rank.process.pid} was stopped "
                "(SIGSTOP)"
            )
            rank.kill()
        running = [rank for rank in running if rank.process.poll() is None]
        if time.monotonic() > deadline:
            for rank in running:
                said.append(f"Rank {rank.rank} did not end within {_GRACE_S:g} s and was killed")
                rank.kill()
            break
        time.sleep(_POLL_S)
    return said


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"
