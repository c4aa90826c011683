"""Start the worker ranks of an engine that this process, such as a notebook, leads."""

import json
import os
import subprocess
import sys
import time
from typing import Any

from torch.distributed import TCPStore

from ee_llm.errors import RunError
from ee_llm.launch.rank import launched_environment, parse_report, rank_environment

_START = """
import sys
sys.path[:] = {path!r}
from ee_llm.launch.rank import exit_at_end_of
exit_at_end_of(int(sys.argv[1]))
from ee_llm.inference.ranks.worker import run_worker
run_worker(sys.argv[2])
"""
_READY = "EE_LLM_WORKER_PORT"  # port of the store in which a worker announces that it is ready
_END_S, _POLL_S = 30.0, 0.02
_NOTICE_S = 2.0  # for a lost worker's process to end after its connections have closed


class Workers:
    """Ranks 1 to n - 1 of n ranks, as processes of this machine; this process is rank 0.

    They end when this process ends, for whatever reason: each watches a pipe whose other end only
    this process holds. The kernel could signal them instead, but it does so when the thread that
    started them ends.

    Attributes:
        store: The store of the process group.
    """

    def __init__(self, num_ranks: int, arguments: dict[str, Any]) -> None:
        """Start the workers; arguments: those of `LLM`, as JSON's own types."""
        text = json.dumps(arguments)
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._processes: list[tuple[subprocess.Popen[bytes], int]] = []
        self._reasons: dict[int, str] = {}
        watched, self._held = os.pipe()
        try:
            for rank in range(1, num_ranks):
                self._start(rank, num_ranks, watched, text)
        except BaseException:
            self._kill()
            self.close()
            raise
        finally:
            os.close(watched)

    def _start(self, rank: int, num_ranks: int, watched: int, arguments: str) -> None:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        environment = {
            **rank_environment(rank, num_ranks, self.store.port),
            _READY: str(self.store.port),
            **launched_environment(writer),
        }
        code = _START.format(path=sys.path)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(watched), arguments],
                env=os.environ | environment,
                pass_fds=[watched, writer],
                start_new_session=True,  # Ctrl-C in a terminal reaches the leader only.
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._processes.append((process, reader))

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every worker joins the process group next.

        Raises:
            RunError: A worker has ended, or is not ready after `timeout_s` seconds.
        """
        end = time.monotonic() + timeout_s
        for rank, (process, _) in self._numbered():
            while not self.store.check([_ready_key(rank)]):
                if process.poll() is not None:
                    self._kill()
                    raise RunError(f"Rank {rank} of the engine ended: {self._reason(rank)}")
                if time.monotonic() > end:
                    self._kill()
                    raise RunError(
                        f"Rank {rank} of the engine has not started after {timeout_s:g} s. Raise"
                        " timeout_s if the machine is slow."
                    )
                time.sleep(_POLL_S)

    def describe_lost(self) -> str:
        """Return which worker has ended, and why, as a sentence; empty if all of them run."""
        end = time.monotonic() + _NOTICE_S
        while True:
            ended = [rank for rank, (process, _) in self._numbered() if process.poll() is not None]
            if ended or not self._processes or time.monotonic() > end:
                break
            time.sleep(_POLL_S)
        reasons = [(rank, self._reason(rank)) for rank in ended]
        # A worker that has lost another one is not the cause.
        reasons.sort(key=lambda one: one[1].startswith("RankLostError"))
        return "Rank {} of the engine ended: {}".format(*reasons[0]) if reasons else ""

    def _numbered(self) -> list[tuple[int, tuple[subprocess.Popen[bytes], int]]]:
        return list(enumerate(self._processes, start=1))

    def _reason(self, rank: int) -> str:
        if rank not in self._reasons:  # A report can be read once.
            process, reader = self._processes[rank - 1]
            self._reasons[rank] = _reported(reader, process)
        return self._reasons[rank]

    def _kill(self) -> None:
        for process, _ in self._processes:
            process.kill()

    def close(self) -> None:
        """Wait for the workers to end, and kill those that do not; shut down the engine first."""
        processes, self._processes = self._processes, []
        for process, reader in processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(reader)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def announce_ready() -> TCPStore | None:
    """Tell the leader that this process, if it is a worker, joins the process group next.

    Returns:
        The store of the process group; None if `Workers` has not started this process.
    """
    if _READY not in os.environ:
        return None
    store = TCPStore("localhost", int(os.environ[_READY]), is_master=False)
    store.set(_ready_key(int(os.environ["RANK"])), "")
    return store


def _ready_key(rank: int) -> str:
    return f"ee_llm/ready/{rank}"


def _reported(reader: int, process: subprocess.Popen[bytes]) -> str:
    try:
        message = parse_report(os.read(reader, 1 << 20)).message
    except OSError:
        message = ""
    status = process.returncode
    return message or (f"killed by signal {-status}" if status < 0 else f"exit status {status}")
