"""Training runs in separate processes that stop in the middle of a step."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.distributed.harness import free_port
from tests.distributed.runs import make_config
from tests.ended import is_gone

ROOT = Path(__file__).resolve().parents[2]

STARTS = {
    "single": ["-m", "ee_llm", "train", "--config", "train.toml"],
    "nproc": ["-m", "ee_llm", "train", "--config", "train.toml", "--nproc", "2"],
    "torchrun": [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--module", "ee_llm", "train", "--config", "train.toml"),
    ],
}

# A sitecustomize module that makes one step of every rank long and records its start.
LONG_STEP = """
import os, sys, time
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "ee_llm.training.trainer":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            compute_gradients = module._Trainer.compute_gradients
            def slow_step(self, batches):
                step, seconds = map(int, os.environ["LONG_STEP"].split())
                if self.state.step + 1 == step:
                    open(f"begun-{self.grid.rank}", "w").write(str(os.getpid()))
                    end = time.monotonic() + seconds
                    while (remaining := end - time.monotonic()) > 0:
                        time.sleep(min(remaining, 0.1))
                return compute_gradients(self, batches)
            module._Trainer.compute_gradients = slow_step
        spec.loader.exec_module = exec_module
        return spec

if "LONG_STEP" in os.environ:
    sys.meta_path.insert(0, Finder)
"""


class Place:
    """A directory with a run of six steps, in one process or in two pipeline ranks."""

    def __init__(self, path: Path, corpus: str, **options: Any) -> None:
        path.mkdir()
        self.path = path
        self.run = path / "run"
        config = make_config(
            "run",
            corpus,
            **{
                "training.steps": 6,
                "training.eval_interval": 3,
                "training.eval_steps": 1,
                "model.dropout": 0.1,
            }
            | options,
        )
        (path / "train.toml").write_text(config.to_toml())
        (path / "sitecustomize.py").write_text(LONG_STEP)

    @contextlib.contextmanager
    def started(
        self, how: str, *, long_step: tuple[int, int] | None = None, shell: str = "", **streams: Any
    ) -> Iterator[subprocess.Popen[str]]:
        """Start the run; at the end, kill it and assert that all of its ranks are gone.

        Args:
            how: A key of STARTS, or a script.
            long_step: A step and its duration in seconds.
            shell: A shell command that runs the training command, "$@".
            streams: Arguments of Popen, and `environment`, variables to add.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{self.path}:{ROOT}"}
        if long_step is not None:
            environment["LONG_STEP"] = f"{long_step[0]} {long_step[1]}"
        environment |= streams.pop("environment", {})
        command = [sys.executable, *STARTS.get(how, [])]
        if how == "scripts/torchrun.sh":
            command = [str(ROOT / how), "--config", "train.toml"]
            environment |= {"PROCS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
            environment |= {"PYTHON": sys.executable}
        if shell:
            command = ["bash", "-c", shell, "bash", *command]
        if "stderr" not in streams:
            streams["stderr"] = subprocess.PIPE
        process = subprocess.Popen(
            command,
            cwd=self.path,
            env=environment,
            text=True,
            start_new_session=True,
            preexec_fn=_with_default_signals,
            **streams,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pid in self.ranks():
                assert is_gone(pid), f"rank with process {pid} outlived its launcher"

    def finish(self, how: str, **options: Any) -> str:
        """Run to the end and return the text on standard error."""
        with self.started(how, **options) as process:
            _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        return err or ""

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that have started the long step, by rank."""
        return [int(path.read_text()) for path in sorted(self.path.glob("begun-*"))]

    def wait_for_long_step(self, process: subprocess.Popen[str], num_ranks: int) -> list[int]:
        """Wait until all ranks are in the long step and return their process ids."""
        deadline = time.monotonic() + 120
        while len([text for p in self.path.glob("begun-*") if (text := p.read_text())]) < num_ranks:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.ranks()


def _with_default_signals() -> None:
    # A shell's background job, which may run the tests, ignores SIGINT.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
