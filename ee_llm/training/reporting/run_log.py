"""Report the metrics of a run to a JSONL file and the console, and to TensorBoard and W&B.

Metrics have Megatron-LM's names, so that its dashboards and scripts can read them.
"""

import datetime
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.progress import Progress, TextColumn

from ee_llm import distributed
from ee_llm.atomic_file import replace_text
from ee_llm.config import Config
from ee_llm.errors import UserError
from ee_llm.launch.streams import stream_trouble
from ee_llm.losses.exit_sums import Validation

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
SUPERSEDED = "log.superseded.jsonl"
LEARNING_RATE = "learning-rate"
GRAD_NORM = "grad-norm"
TOKENS_PER_SECOND = "tokens-per-second"
ITERATION_TIME = "iteration-time"
_VALIDATION = " validation"  # suffix of the name of a validation loss
PEAK_MEMORY = "peak-memory-gib"  # largest over all ranks, since the start of the process


def loss_name(boundary: int, num_layers: int) -> str:
    """Return the name of the loss of the exit at `boundary`, such as "exit 6 loss" or "lm loss"."""
    return "lm loss" if boundary == num_layers else f"exit {boundary} loss"


def validation_metrics(validation: Validation, num_layers: int) -> dict[str, float]:
    """Return losses in nats, perplexities and agreement under their names for validation."""
    metrics = {}
    for boundary, loss in validation.losses.items():
        name = f"{loss_name(boundary, num_layers)}{_VALIDATION}"
        metrics[name] = loss
        metrics[f"{name} ppl"] = math.exp(min(loss, 700.0))  # beyond, a float overflows
        if (agreement := validation.agreement.get(boundary)) is not None:
            metrics[f"exit {boundary} agreement{_VALIDATION}"] = agreement
    return metrics


class Sink(Protocol):
    """A destination for metrics by name and step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """Reports the metrics of a run from the rank that logs; does nothing on other ranks.

    `start_step` is the step that the run resumes from. Lines of later steps, written by a run that
    stopped some time after its last checkpoint, move to log.superseded.jsonl, so that the log
    contains every step once and nothing is lost.
    """

    def __init__(self, config: Config, *, start_step: int = 0, is_logging: bool = True) -> None:
        """Open the log and the trackers. Raises UserError if a tracker's package is missing."""
        self._steps = config.training.steps
        self._sinks: list[Sink] = []
        self._file: _JsonLines | None = None
        self._progress: Progress | None = None
        self._is_trouble_recorded = False
        # The first step is slower than the others, and the second may have its own report.
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
        """Record that a training step is done, which took `tokens` tokens over all ranks."""
        self._step = step
        self._tokens += tokens
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
            if step == self._estimate_step:
                self._print_estimate()

    def _print_estimate(self) -> None:
        """Print the estimated duration of the run, because the first report may be hours away."""
        seconds = (time.perf_counter() - self._since) / (self._step - self._reported)
        remaining = datetime.timedelta(seconds=round((self._steps - self._step) * seconds))
        distributed.print_line(
            f"step {self._step}/{self._steps} · {seconds:.3g} s per step · ETA {remaining}"
        )

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the training metrics of `step` and the speed since the last report."""
        if self._file is None:
            return
        seconds = time.perf_counter() - self._since
        steps = self._step - self._reported
        speed = {}
        if steps > 0 and self._tokens:
            speed = {TOKENS_PER_SECOND: self._tokens / seconds, ITERATION_TIME: seconds / steps}
        self._write(step, {**metrics, **speed})
        remaining_s = (self._steps - step) * speed.get(ITERATION_TIME, math.nan)
        self._print(step, metrics, speed, remaining_s)
        self.restart_clock()

    def report_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a validation, which does not count in the training speed."""
        self._write(step, metrics)
        self._print(step, metrics, {}, math.nan)

    def event(self, step: int, name: str, **details: Any) -> None:
        """Write an event ("saved", "skipped", "interrupted") to the JSONL file only."""
        if self._file is not None:
            self._file.write({"step": step, "event": name, **details})

    def restart_clock(self) -> None:
        """Restart the measurement of the speed, as after a validation or a save."""
        self._since = time.perf_counter()
        self._reported = self._step
        self._tokens = 0

    def close(self) -> None:
        """Flush and close the log and the trackers. Further calls do nothing."""
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
        self,
        step: int,
        metrics: Mapping[str, float],
        speed: Mapping[str, float],
        remaining_s: float,
    ) -> None:
        if self._progress is None:
            return
        parts = [f"step {step}/{self._steps}"]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        if speed:
            parts.append(f"{speed[TOKENS_PER_SECOND]:,.0f} tokens/s")
        if math.isfinite(remaining_s) and remaining_s > 0:
            parts.append(f"ETA {datetime.timedelta(seconds=round(remaining_s))}")
        distributed.print_line(" · ".join(parts))
        self._record_trouble(step)

    def _record_trouble(self, step: int) -> None:
        """Write an event, once, if standard error has failed."""
        trouble = stream_trouble()
        if trouble and not self._is_trouble_recorded:
            self._is_trouble_recorded = True
            self.event(step, "console lost", error=trouble)


def _progress_bar(steps: int, start_step: int) -> Progress:
    steps_done = TextColumn("{task.completed}/{task.total}")
    progress = distributed.progress_bar("training", steps, steps_done, completed=start_step)
    progress.start()
    return progress


class _JsonLines:
    """Writes one JSON object per line without delay; non-finite numbers become null.

    A full disk does not end the run: lines stay in memory until they can be written.
    """

    def __init__(self, output: Path, start_step: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / LOG
        if path.exists():
            _supersede(path, output / SUPERSEDED, start_step)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._unwritten = b""
        self._has_reported_failure = False

    def write(self, record: Mapping[str, Any]) -> None:
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
        self._unwritten += line.encode(errors="replace")
        self._flush()

    def close(self) -> None:
        self._flush()
        if self._unwritten:
            num_lines = self._unwritten.count(b"\n")
            logger.error("%s lacks the last %d lines", self._path, num_lines)
        os.close(self._file)

    def _flush(self) -> None:
        try:
            while self._unwritten:  # a disk that is nearly full accepts a part of a line
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            if not self._has_reported_failure:
                self._has_reported_failure = True
                logger.error(
                    "%s cannot be written (%s). Its lines stay in memory until it can. Free space "
                    "on the disk.",
                    self._path,
                    error.strerror,
                )


def _supersede(path: Path, superseded: Path, start_step: int) -> None:
    """Move lines of steps after `start_step`, and a line cut off by a crash, to `superseded`."""
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
    """Return whether the log in `output` exists and has no validation of `step`."""
    path = Path(output) / LOG
    if not path.exists():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    matching = [line for line in lines if _step_of(line) == step]
    return not any(name.endswith(_VALIDATION) for line in matching for name in json.loads(line))


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
        # Hides the records of steps that an earlier run took and that this run repeats.
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
    """Return the W&B id of the run in `output`, which a resumed run keeps."""
    path = output / "wandb-run-id"
    if not path.exists():
        path.write_text(os.urandom(4).hex() + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _missing(option: str, package: str) -> UserError:
    return UserError(
        f"{option} needs the package {package}, which is not installed. Run "
        "pip install 'ee-llm[track]', or turn the option off."
    )
