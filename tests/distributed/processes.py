"""Training runs as a person starts them: separate processes, stopped in the middle of a step."""

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
    "alone": ["-m", "ee_llm", "train", "--config", "train.toml"],
    "nproc": ["-m", "ee_llm", "train", "--config", "train.toml", "--nproc", "2"],
    "torchrun": [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--module", "ee_llm", "train", "--config", "train.toml"),
    ],
}

# Makes one step of every rank long, from outside, and says when a rank has begun it.
LONG_STEP = """
import os, sys, time
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "ee_llm.training.trainer":
            return None
        spec = PathFinder.find_spec(name, path)
        whole = spec.loader.exec_module
        def exec_module(module):
            whole(module)
            losses_of = module._Trainer.losses_of
            def longer(self, batches):
                step, seconds = map(int, os.environ["LONG_STEP"].split())
                if self.state.step + 1 == step:
                    open(f"begun-{self.grid.rank}", "w").write(str(os.getpid()))
                    end = time.monotonic() + seconds
                    while (left := end - time.monotonic()) > 0:
                        time.sleep(min(left, 0.1))
                return losses_of(self, batches)
            module._Trainer.losses_of = longer
        spec.loader.exec_module = exec_module
        return spec

if "LONG_STEP" in os.environ:
    sys.meta_path.insert(0, Finder)
"""


class Place:
    """A directory to train in, two ranks of a pipeline or one process, six steps."""

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
        """Give a running process; afterwards nothing that it started is left.

        long_step: a step and the seconds that it takes. shell: what a shell is to do with the
        command, which is "$@" there.
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
                assert is_gone(pid), f"rank with process {pid} has outlived its launcher"

    def finish(self, how: str, **options: Any) -> str:
        """Run to the end; return what was written to standard error."""
        with self.started(how, **options) as process:
            _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        return err or ""

    def ranks(self) -> list[int]:
        """Process ids of the ranks that have begun the long step, by rank."""
        return [int(path.read_text()) for path in sorted(self.path.glob("begun-*"))]

    def wait_for_long_step(self, process: subprocess.Popen[str], num_ranks: int) -> list[int]:
        """Return the ranks' process ids when all of them are in the long step."""
        deadline = time.monotonic() + 120
        while len([text for p in self.path.glob("begun-*") if (text := p.read_text())]) < num_ranks:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.ranks()


def _with_default_signals() -> None:
    # A shell's background job, as tests may be, has been told to ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
