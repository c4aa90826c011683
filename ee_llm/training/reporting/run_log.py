"""What a run reports: a JSONL file always, the console, TensorBoard and W&B when asked.

Names of quantities are Megatron's, so that its dashboards and scripts read our runs.
"""

import datetime
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.markup import escape
from rich.progress import Progress, TextColumn

from ee_llm import distributed
from ee_llm.atomic_file import replace_text
from ee_llm.config import Config
from ee_llm.launch.streams import stream_trouble

LOG = "log.jsonl"
SUPERSEDED = "log.superseded.jsonl"
LEARNING_RATE = "learning-rate"
GRAD_NORM = "grad-norm"
TOKENS_PER_SECOND = "tokens-per-second"
ITERATION_TIME = "iteration-time"
_VALIDATION = " validation"  # ends the name of a validation loss
PEAK_MEMORY = "peak-memory-gib"  # of the fullest rank since the process began


def loss_name(boundary: int, num_layers: int) -> str:
    """Return what the loss of the exit at `boundary` is called: "exit 6 loss", or "lm loss"."""
    return "lm loss" if boundary == num_layers else f"exit {boundary} loss"


def validation_metrics(losses: Mapping[int, float], num_layers: int) -> dict[str, float]:
    """Return validation losses (by boundary, in nats) and perplexities under Megatron's names."""
    metrics = {}
    for boundary, loss in losses.items():
        name = f"{loss_name(boundary, num_layers)}{_VALIDATION}"
        metrics[name] = loss
        metrics[f"{name} ppl"] = math.exp(min(loss, 700.0))  # beyond, a float overflows
    return metrics


class Sink(Protocol):
    """A place that takes numbers by name and step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """Reports a run from the one rank that logs; on other ranks it does nothing.

    `start_step` is the step that the run goes on from. Lines of later steps, which a run that
    stopped after its last checkpoint has left, move to log.superseded.jsonl: the log holds every
    step once, and nothing is lost.
    """

    def __init__(self, config: Config, *, start_step: int = 0, is_logging: bool = True) -> None:
        """Open what the configuration asks for; raises UserError for a package that is missing."""
        self._steps = config.training.steps
        self._sinks: list[Sink] = []
        self._file: _JsonLines | None = None
        self._progress: Progress | None = None
        self._is_trouble_noted = False
        # The first step is slower than others, and the second may have a report of its own.
        second, interval = start_step + 2, config.logging.interval
        self._estimate_step = second if second % interval and second < self._steps else None
        self._step = start_step
        self._reported = start_step
        self._tokens = 0
        self._since = time.perf_counter()
        if not is_logging:
            return
        output = Path(config.output)
        if config.logging.tensorboard:
            self._sinks.append(_TensorBoard(output / "tensorboard", start_step))
        if config.logging.wandb_project is not None:
            self._sinks.append(_WandB(output, config))
        self._file = _JsonLines(output, start_step)
        self._progress = _progress_bar(self._steps, start_step)

    def advance(self, step: int, tokens: int) -> None:
        """Count a finished training step of `tokens` tokens over all ranks."""
        self._step = step
        self._tokens += tokens
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
            if step == self._estimate_step:
                self._print_estimate()

    def _print_estimate(self) -> None:
        """Print how long the run will take, early: the first report may be hours away."""
        assert self._progress is not None
        seconds = (time.perf_counter() - self._since) / (self._step - self._reported)
        left = datetime.timedelta(seconds=round((self._steps - self._step) * seconds))
        self._progress.console.print(
            f"step {self._step}/{self._steps} · {seconds:.3g} s per step · ETA {left}",
            soft_wrap=True,
        )

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write training metrics of `step`, with the speed since the last report added."""
        if self._file is None:
            return
        seconds = time.perf_counter() - self._since
        steps = self._step - self._reported
        speed = {}
        if steps > 0 and self._tokens:
            speed = {TOKENS_PER_SECOND: self._tokens / seconds, ITERATION_TIME: seconds / steps}
        self._write(step, {**metrics, **speed})
        left = (self._steps - step) * speed.get(ITERATION_TIME, math.nan)
        self._print(step, metrics, speed, left)
        self.restart_clock()

    def report_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics of a validation, which does not count in the training speed."""
        self._write(step, metrics)
        self._print(step, metrics, {}, math.nan)

    def event(self, step: int, what: str, **facts: Any) -> None:
        """Write that something happened ("saved", "skipped", "resumed") to the JSONL file alone."""
        if self._file is not None:
            self._file.write({"step": step, "event": what, **facts})

    def restart_clock(self) -> None:
        """Begin to measure the speed anew, as after a validation or a save."""
        self._since = time.perf_counter()
        self._reported = self._step
        self._tokens = 0

    def close(self) -> None:
        """Flush and close everything; calling it twice does no harm."""
        if self._progress is not None:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            self._file.close()
        self._sinks, self._file, self._progress = [], None, None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write({"step": step, "time": round(time.time(), 3), **metrics})
        for sink in self._sinks:
            sink.write(step, metrics)

    def _print(
        self, step: int, metrics: Mapping[str, float], speed: Mapping[str, float], left: float
    ) -> None:
        if self._progress is None:
            return
        parts = [f"step {step}/{self._steps}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        if speed:
            parts.append(f"{speed[TOKENS_PER_SECOND]:,.0f} tokens/s")
        if math.isfinite(left) and left > 0:
            parts.append(f"ETA {datetime.timedelta(seconds=round(left))}")
        self._progress.console.print(" · ".join(parts), soft_wrap=True)
        self._note_trouble(step)

    def _note_trouble(self, step: int) -> None:
        """Write to the file, once, that the console takes no more of what it is given."""
        trouble = stream_trouble()
        if trouble and not self._is_trouble_noted:
            self._is_trouble_noted = True
            self.event(step, "console lost", error=trouble)


def _progress_bar(steps: int, start_step: int) -> Progress:
    steps_done = TextColumn("{task.completed}/{task.total}")
    progress = distributed.progress_bar("training", steps, steps_done, completed=start_step)
    progress.start()
    return progress


class _JsonLines:
    """One JSON object per line, written at once; numbers that are not finite become null.

    A full disk does not end the run: lines wait in memory until there is room for them.
    """

    def __init__(self, output: Path, start_step: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / LOG
        if path.exists():
            _supersede(path, output / SUPERSEDED, start_step)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._waiting = b""
        self._is_told = False

    def write(self, record: Mapping[str, Any]) -> None:
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting += line.encode(errors="replace")
        self._flush()

    def close(self) -> None:
        self._flush()
        if self._waiting:
            num_lines = self._waiting.count(b"\n")
            distributed.log(f"[red]{escape(str(self._path))} lacks the last {num_lines} lines[/]")
        os.close(self._file)

    def _flush(self) -> None:
        try:
            while self._waiting:  # a disk that is nearly full takes a part of a line
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                distributed.log(
                    f"[red]{escape(str(self._path))} cannot be written ({error.strerror}); its "
                    "lines wait in memory until it can. Make room on the disk[/]"
                )


def _supersede(path: Path, superseded: Path, start_step: int) -> None:
    """Move the lines of steps after `start_step`, and a line torn by a crash, to another file."""
    kept: list[str] = []
    moved: list[str] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in filter(None, text.split("\n")):
        (kept if _step_of(line) <= start_step else moved).append(line + "\n")
    if not moved:
        return
    with open(superseded, "a", encoding="utf-8") as file:
        file.writelines(moved)
    replace_text(path, "".join(kept))


def lacks_validation(output: Path | str, step: int) -> bool:
    """Return whether the log in `output`, if there is one, has no validation of `step`."""
    path = Path(output) / LOG
    if not path.exists():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    here = [line for line in lines if _step_of(line) == step]
    return not any(name.endswith(_VALIDATION) for line in here for name in json.loads(line))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class _TensorBoard:
    def __init__(self, directory: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("logging.tensorboard", "tensorboard") from error
        # Hides what an earlier run wrote about steps that are now taken again.
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, output: Path, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("logging.wandb_project", "wandb") from error
        output.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.logging.wandb_project,
            mode=config.logging.wandb_mode,
            dir=str(output),
            name=output.name,
            id=_run_id(output),
            resume="allow",
            config=config.model_dump(),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(output: Path) -> str:
    """Return the W&B id of the run in `output`, the same when it is resumed."""
    path = output / "wandb-run-id"
    if not path.exists():
        path.write_text(os.urandom(4).hex() + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _missing(option: str, package: str) -> ValueError:
    return ValueError(
        f"{option} needs the package {package}, which is not installed; "
        "pip install 'ee-llm[track]', or turn the option off"
    )
