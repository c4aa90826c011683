"""The training loop: steps, validation, reports, checkpoints."""

import functools
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.markup import escape

from ee_llm import distributed
from ee_llm.atomic_file import replace_text
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.lock import OutputLock
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.resume import initial_path, resume_path
from ee_llm.checkpoint.sharded.save import save
from ee_llm.checkpoint.tokenizer import companions, settings_of
from ee_llm.checkpoint.warm_start import warm_start
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from ee_llm.errors import RunError
from ee_llm.launch.rank import report_stopped
from ee_llm.training.backends import BACKENDS
from ee_llm.training.consensus import (
    during,
    fail_together,
    from_first,
    is_lost_contact,
    largest,
    lost_contact,
)
from ee_llm.training.inputs import open_data
from ee_llm.training.optimizer import set_learning_rate
from ee_llm.training.precision import choose_dtype
from ee_llm.training.reporting.run_log import (
    GRAD_NORM,
    LEARNING_RATE,
    LOG,
    PEAK_MEMORY,
    RunLog,
    lacks_validation,
    loss_name,
    validation_metrics,
)
from ee_llm.training.reporting.tracing import traced_step
from ee_llm.training.schedule import learning_rate, wasted_steps
from ee_llm.training.signals import StopSignals
from ee_llm.training.tuning import INITIALIZATIONS, tuned_part

SKIPPED = "skipped iterations"
Result = TypeVar("Result")
# How long a rank that lost another waits for the other ranks before it says so.
_PATIENCE_S = 2.0


class TrainingStopped(RunError):
    """Training gave up, with its state saved; the message says why and where."""


class TrainingInterrupted(SystemExit):
    """A signal ended training after a whole step, with its state saved.

    `code` is the exit status that a shell expects: 128 + the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def train(config: Config) -> Path:
    """Train the model of `config`, or tune its exits, and return its last checkpoint.

    Under torchrun this is one rank of many; without a launcher, the whole run. Goes on from the
    newest checkpoint in `config.output` unless `checkpoint.resume` says otherwise. SIGTERM, SIGINT
    or SIGHUP on any rank ends it after the current step, saved, with TrainingInterrupted.

    Raises UserError for what a user can mend, TrainingStopped after too many bad steps in a row,
    LostContactError when another rank died.
    """
    grid = distributed.initialize(
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        timeout_s=config.parallel.timeout_s,
        seed=config.training.seed,
    )
    lock = OutputLock(config.output)
    try:
        fail_together(lambda: directory.check_output(config.output))
        from_first(lock.take)
        return _Trainer(config, grid).run()
    except TrainingInterrupted as stop:
        report_stopped(stop.signal)
        raise
    except RuntimeError as error:
        if grid.world_size == 1 or not is_lost_contact(error):
            raise
        raise lost_contact(error, grid, _PATIENCE_S) from error
    finally:
        distributed.shutdown()
        lock.release()


class _Trainer:
    def __init__(self, config: Config, grid: distributed.Grid) -> None:
        resume = from_first(lambda: resume_path(config))
        initial = None if resume else from_first(lambda: initial_path(config))
        self.grid = grid
        self.config = config = _with_dtype(config, resume or initial)
        dtype = distributed.DTYPES[config.training.dtype]
        self.train_data, self.validation_data = fail_together(lambda: open_data(config, grid))
        self.engine = BACKENDS[config.parallel.engine]
        self.model = self.engine.build_model(config, grid, dtype)
        self.initial = initial
        if initial is not None:
            beginning = warm_start(initial, self.model.stages, config)
            INITIALIZATIONS[config.exits.initialization](beginning, self.model)
        # What is frozen is saved as it is in the newest checkpoint.
        self.frozen = (resume or initial) if config.is_tuning else None
        self.frozen_mark = self.mark_of_frozen()
        source = resume or initial
        self.files = from_first(
            lambda: companions(source) if source else settings_of(config.data.tokenizer)
        )
        self.optimizer, self.state = self.engine.build_optimizer(self.model, resume)
        self.saved: tuple[int, Path] | None = None
        if resume is not None:
            self.train_data.consumed_samples = self.state.consumed_samples
            self.saved = self.state.step, resume
        self.signals = StopSignals()
        self.batches = self.agreed(self.train_data)
        self.log = fail_together(lambda: _open_log(config, self.state.step, grid))
        self.must_validate_first = self.has_missed_validation()
        self.first_step = self.state.step + 1
        self.bad_steps = 0

    def run(self) -> Path:
        """Return the last checkpoint, after all steps that are left."""
        self.announce()
        with self.log, self.signals:
            try:
                self.loop()
            except TrainingInterrupted as stop:
                self.interrupted(stop.signal.name)
                raise
        assert self.saved is not None
        distributed.log(f"step {self.state.step} is saved in {escape(str(self.saved[1]))}")
        return self.saved[1]

    def announce(self) -> None:
        config, grid = self.config, self.grid
        if self.state.step >= config.training.steps:
            what = f"nothing to do: training.steps = {config.training.steps}, and this is"
        else:
            what = "going on from" if self.saved else "beginning"
        where = f" step {self.state.step}, {escape(str(self.saved[1]))}" if self.saved else ""
        if self.initial is not None:
            where = f" with {escape(str(self.initial))}"
        if config.is_tuning:
            distributed.log(escape(tuned_part(config)))
        if warning := wasted_steps(config.optimizer, config.training.steps):
            distributed.log(f"[yellow]{escape(warning)}[/yellow]")
        distributed.log(
            f"{what}{where}: {config.training.dtype}, tensor {grid.tensor_size} x pipeline "
            f"{grid.pipeline_size} x data {grid.data_size}, log in "
            f"{escape(str(Path(config.output) / LOG))}"
        )

    def loop(self) -> None:
        config, state = self.config, self.state
        if self.must_validate_first:
            self.validate()
        while state.step < config.training.steps:
            with during(f"step {state.step + 1}"):
                self.step(next(self.batches))
            if self.is_validation_due():
                self.validate()
            if _is_due(state.step, config.checkpoint.interval) or self.is_last():
                self.save()

    def is_last(self) -> bool:
        return self.state.step == self.config.training.steps

    def is_validation_due(self) -> bool:
        return _is_due(self.state.step, self.config.training.eval_interval) or self.is_last()

    def has_missed_validation(self) -> bool:
        """Return whether a signal came before the validation of the step to resume from."""
        if self.saved is None or not self.is_validation_due():
            return False
        return from_first(lambda: lacks_validation(self.config.output, self.state.step))

    def agreed(self, steps: Iterable[Sequence[Microbatch]]) -> Iterator[Sequence[Microbatch]]:
        """Yield this rank's share of each global batch that all ranks could read.

        Raises on every rank if one could not, and TrainingInterrupted if one was told to stop.
        """
        batches = iter(steps)
        while True:
            read = _attempt(lambda: next(batches, None))
            failed, number = largest(isinstance(read, Exception), self.signals.received)
            if failed:
                fail_together(functools.partial(_raise, read))
            if number:
                raise TrainingInterrupted(number)
            if read is None:
                return
            assert not isinstance(read, Exception)
            yield read

    def step(self, batches: Sequence[Microbatch]) -> None:
        """Take one optimizer step, or skip it if its loss or gradient is not finite.

        Without a valid token the loss is NaN: not even the weights' decay is applied.
        """
        config, state = self.config, self.state
        losses = self.losses_of(batches)
        state.step += 1
        state.consumed_samples = self.train_data.consumed_samples
        rate = learning_rate(state.step, config.optimizer, config.training.steps)
        set_learning_rate(self.optimizer, rate)
        updated, grad_norm = False, math.nan
        if all(math.isfinite(loss) for loss in losses.values()):
            updated, grad_norm = self.engine.take_step(self.optimizer, config)
        self.log.advance(state.step, config.training.global_batch_size * config.data.seq_length)
        if state.step == self.first_step:
            self.log.restart_clock()  # the first step builds what the others find ready
        metrics = {loss_name(b, config.model.num_layers): loss for b, loss in losses.items()}
        metrics |= {LEARNING_RATE: rate, GRAD_NORM: grad_norm}
        self.bad_steps = 0 if updated else self.bad_steps + 1
        if not updated:
            state.skipped_steps += 1
            self.log.event(state.step, "skipped", **metrics)
        if _is_due(state.step, config.logging.interval) or state.step == config.training.steps:
            [peak_bytes] = largest(distributed.peak_memory_bytes())
            so_far = {SKIPPED: state.skipped_steps, PEAK_MEMORY: peak_bytes / 2**30}
            self.log.report(state.step, metrics | so_far)
        if self.bad_steps >= config.training.max_bad_steps:
            self.stop(metrics)

    def losses_of(self, batches: Sequence[Microbatch]) -> dict[int, float]:
        """Compute the gradients of the step at hand, written down if it is to be traced."""
        step, config = self.state.step, self.config
        if step + 1 not in config.logging.trace_steps:
            return self.model.forward_backward(batches, step)
        path = Path(config.output) / f"trace-{step + 1:08}.json"
        return traced_step(self.model, batches, step, path)

    def stop(self, metrics: dict[str, float]) -> None:
        self.save()
        self.log.event(self.state.step, "stopped")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        assert self.saved is not None
        raise TrainingStopped(
            f"{self.bad_steps} steps in a row (training.max_bad_steps) had a loss or gradient that "
            f"is not finite (the last one: {shown}), or no valid token, which makes the loss NaN; "
            f"none of them changed the model, which is saved in {self.saved[1]}; try a lower "
            "optimizer.lr, more optimizer.warmup_steps or float32"
        )

    def interrupted(self, name: str) -> None:
        step = self.state.step
        if step and (self.saved is None or self.saved[0] != step):
            self.save()
        self.log.event(step, "interrupted", signal=name)
        where = "nothing to save" if self.saved is None else f"saved in {self.saved[1]}"
        distributed.log(f"stopped by {name} after step {step}: {escape(where)}")
        largest(0)  # a launcher may end the ranks that are left as soon as one of them ends

    def validate(self) -> None:
        """Measure and report the loss of every exit on the validation data, if there is any."""
        if self.validation_data is None:
            return
        with during(f"the validation after step {self.state.step}"):
            losses = self.model.evaluate(self.agreed(self.validation_data))
        self.log.report_validation(
            self.state.step, validation_metrics(losses, self.config.model.num_layers)
        )
        self.log.restart_clock()

    def save(self) -> None:
        with during(f"the save of step {self.state.step}"):
            path = save(
                self.config.output,
                self.model.stages,
                self.optimizer,
                self.state,
                self.config,
                self.frozen,
                self.frozen_mark,
                self.files,
            )
        self.saved = self.state.step, path
        self.frozen = self.frozen and path
        self.frozen_mark = self.mark_of_frozen()
        self.log.event(self.state.step, "saved", checkpoint=str(path))
        self.log.restart_clock()

    def mark_of_frozen(self) -> str | None:
        """Return what tells the checkpoint that is kept from another that takes its place."""
        if (frozen := self.frozen) is None:
            return None
        return from_first(lambda: TensorReader(frozen).fingerprint())


def _attempt(step: Callable[[], Result]) -> Result | Exception:
    try:
        return step()
    except Exception as error:
        return error


def _raise(error: object) -> None:
    if isinstance(error, Exception):
        raise error


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _with_dtype(config: Config, source: Path | None) -> Config:
    """Return the configuration with a definite precision: "auto" is that of `source`, if any."""
    name: str = config.training.dtype
    if name == "auto" and source is not None:
        name = from_first(lambda: TensorReader(source).config().training.dtype)
    if name == "auto":
        name = choose_dtype(config)
    values = config.model_dump()
    values["training"]["dtype"] = name
    return load_config(None, values)  # checked once more: some options depend on the precision


def _open_log(config: Config, start_step: int, grid: distributed.Grid) -> RunLog:
    if grid.rank == 0:
        replace_text(Path(config.output) / "config.toml", config.to_toml())
    return RunLog(config, start_step=start_step, is_logging=grid.rank == 0)
