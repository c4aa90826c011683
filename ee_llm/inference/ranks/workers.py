"""Start the worker ranks of an engine that this process, such as a notebook, leads."""

import json
import os
import subprocess
import sys
import time
from typing import Any

from torch.distributed import TCPStore

from ee_llm.errors import RunError
from ee_llm.launch.rank import launched_environment, parse_report

_START = """
import sys
sys.path[:] = {path!r}
from ee_llm.launch.rank import exit_at_end_of
exit_at_end_of(int(sys.argv[1]))
from ee_llm.inference.ranks.worker import run_worker
run_worker(sys.argv[2])
"""
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # tells torch that the parent hosts the store
_READY = "EE_LLM_WORKER_PORT"  # port of the store in which a worker announces that it is ready
_END_S, _POLL_S = 30.0, 0.02


class Workers:
    """Ranks 1 to n - 1 of n ranks, as processes of this machine; this process is rank 0.

    They end when this process ends, for whatever reason: each watches a pipe whose other end only
    this process holds. The kernel could signal them instead, but it does so when the thread that
    started them ends.
    """

    def __init__(self, num_ranks: int, arguments: dict[str, Any]) -> None:
        """Start the workers; arguments: those of `LLM`, as JSON's own types."""
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._environment = {name: os.environ.get(name) for name in (*_NAMES, _AGENT_STORE)}
        os.environ |= self._rank_environment(0, num_ranks)
        self._processes: list[tuple[subprocess.Popen[bytes], int]] = []
        watched, self._held = os.pipe()
        for rank in range(1, num_ranks):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            environment = self._rank_environment(rank, num_ranks) | launched_environment(writer)
            environment[_READY] = str(self._store.port)
            code = _START.format(path=sys.path)
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(watched), json.dumps(arguments)],
                env=os.environ | environment,
                pass_fds=[watched, writer],
                start_new_session=True,  # Ctrl-C in a terminal reaches the leader only.
            )
            os.close(writer)
            self._processes.append((process, reader))
        os.close(watched)

    def _rank_environment(self, rank: int, num_ranks: int) -> dict[str, str]:
        values = (rank, rank, num_ranks, num_ranks, "localhost", self._store.port)
        return dict(zip(_NAMES, map(str, values), strict=True)) | {_AGENT_STORE: "True"}

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every worker joins the process group next.

        Raises:
            RunError: A worker has ended, or is not ready after `timeout_s` seconds.
        """
        end = time.monotonic() + timeout_s
        for rank, (process, reader) in enumerate(self._processes, start=1):
            while not self._store.check([_ready_key(rank)]):
                if process.poll() is not None:
                    self._kill()
                    raise RunError(f"Rank {rank} of the engine ended: {_reported(reader, process)}")
                if time.monotonic() > end:
                    self._kill()
                    raise RunError(
                        f"Rank {rank} of the engine has not started after {timeout_s:g} s. Raise"
                        " timeout_s if the machine is slow."
                    )
                time.sleep(_POLL_S)

    def _kill(self) -> None:
        for process, _ in self._processes:
            process.kill()

    def close(self) -> None:
        """Wait for the workers to end, and kill those that do not; shut down the engine first."""
        for process, reader in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(reader)
        if self._processes:
            os.close(self._held)
        self._processes = []
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def announce_ready() -> None:
    """Tell the leader that this process, if it is a worker, joins the process group next."""
    if _READY in os.environ:
        store = TCPStore("localhost", int(os.environ[_READY]), is_master=False)
        store.set(_ready_key(int(os.environ["RANK"])), "")


def _ready_key(rank: int) -> str:
    return f"ee_llm/ready/{rank}"


def _reported(reader: int, process: subprocess.Popen[bytes]) -> str:
    try:
        message = parse_report(os.read(reader, 1 << 20)).message
    except OSError:
        message = ""
    return message or f"exit status {process.returncode}"
