"""The training loop: steps, validation, reports and checkpoints."""

import functools
import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

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
    is_lost_contact,
    lost_contact,
    max_over_ranks,
    run_on_rank_zero,
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
from ee_llm.training.tuning import INITIALIZATIONS, describe_tuning, share_norms

logger = logging.getLogger(__name__)

SKIPPED = "skipped iterations"
Result = TypeVar("Result")
# How long a rank that lost contact waits for the other ranks to report the same.
_PATIENCE_S = 2.0


class TrainingStopped(RunError):
    """Training gave up after too many bad steps and saved its state; the message says where."""


class TrainingInterrupted(SystemExit):
    """A signal stopped training after a complete step, and the state is saved.

    `code` is the exit status that a shell expects: 128 + the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def train(config: Config) -> Path:
    """Train the model of `config`, or tune its exits, and return the last checkpoint.

    Under a launcher this process is one rank of the run; without one it is the whole run. The run
    resumes from the newest checkpoint in `config.output` unless `checkpoint.resume` says otherwise.
    After SIGTERM, SIGINT or SIGHUP on any rank the run finishes its step, saves and ends.

    Raises:
        UserError: The configuration, the data or a checkpoint is at fault.
        TrainingStopped: Too many bad steps in a row.
        TrainingInterrupted: A signal stopped the run.
        LostContactError: Another rank died or hangs.
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
        run_on_rank_zero(lock.take)
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
        resume = run_on_rank_zero(lambda: resume_path(config))
        initial = None if resume else run_on_rank_zero(lambda: initial_path(config))
        self.grid = grid
        self.config = config = _with_dtype(config, resume or initial)
        dtype = distributed.DTYPES[config.training.dtype]
        self.train_data, self.validation_data = fail_together(lambda: open_data(config, grid))
        self.backend = BACKENDS[config.parallel.engine]
        self.model = self.backend.build_model(config, grid, dtype)
        self.initial = initial
        if initial is not None:
            start = warm_start(initial, self.model.stages, config)
            INITIALIZATIONS[config.exits.initialization](start, self.model)
            if config.exits.norm == "shared":
                share_norms(start, self.model)
        # Frozen parameters are saved as they are in the newest checkpoint.
        self.frozen = (resume or initial) if config.is_tuning else None
        self.frozen_fingerprint = self.fingerprint_frozen()
        source = resume or initial
        self.files = run_on_rank_zero(
            lambda: companions(source) if source else settings_of(config.data.tokenizer)
        )
        self.optimizer, self.state = self.backend.build_optimizer(self.model, resume)
        self.saved: tuple[int, Path] | None = None
        if resume is not None:
            self.train_data.consumed_samples = self.state.consumed_samples
            self.saved = self.state.step, resume
        self.signals = StopSignals()
        self.batches = self.common_batches(self.train_data)
        self.log = fail_together(lambda: _open_log(config, self.state.step, grid))
        self.must_validate_first = self.has_missed_validation()
        self.first_step = self.state.step + 1
        self.bad_steps = 0

    def run(self) -> Path:
        """Take the remaining steps and return the last checkpoint."""
        self.announce()
        with self.log, self.signals:
            try:
                self.loop()
            except TrainingInterrupted as stop:
                self.save_interrupted(stop.signal.name)
                raise
        assert self.saved is not None
        logger.info("step %d is saved in %s", self.state.step, self.saved[1])
        return self.saved[1]

    def announce(self) -> None:
        config, grid = self.config, self.grid
        if self.state.step >= config.training.steps:
            what = f"nothing to do: training.steps = {config.training.steps} is reached at"
        else:
            what = "resuming from" if self.saved else "starting"
        where = f" step {self.state.step}, {self.saved[1]}" if self.saved else ""
        if self.initial is not None:
            where = f" from {self.initial}"
        if config.is_tuning:
            logger.info(describe_tuning(config))
        if warning := wasted_steps(config.optimizer, config.training.steps):
            logger.warning(warning)
        logger.info(
            "%s%s: %s, tensor %d x pipeline %d x data %d, log in %s",
            what,
            where,
            config.training.dtype,
            grid.tensor_size,
            grid.pipeline_size,
            grid.data_size,
            Path(config.output) / LOG,
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
        """Return whether a signal prevented the validation of the step to resume from."""
        if self.saved is None or not self.is_validation_due():
            return False
        return run_on_rank_zero(lambda: lacks_validation(self.config.output, self.state.step))

    def common_batches(
        self, steps: Iterable[Sequence[Microbatch]]
    ) -> Iterator[Sequence[Microbatch]]:
        """Yield this rank's share of each global batch once all ranks have read theirs.

        Raises on every rank if one rank fails to read, and TrainingInterrupted if one has received
        a stop signal.
        """
        batches = iter(steps)
        while True:
            read = _attempt(lambda: next(batches, None))
            failed, number = max_over_ranks(isinstance(read, Exception), self.signals.received)
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

        Without a valid token the loss is NaN, so that not even weight decay is applied.
        """
        config, state = self.config, self.state
        losses = self.compute_gradients(batches)
        state.step += 1
        state.consumed_samples = self.train_data.consumed_samples
        rate = learning_rate(state.step, config.optimizer, config.training.steps)
        set_learning_rate(self.optimizer, rate)
        updated, grad_norm = False, math.nan
        if all(math.isfinite(loss) for loss in losses.values()):
            updated, grad_norm = self.backend.take_step(self.optimizer, config)
        self.log.advance(state.step, config.training.global_batch_size * config.data.seq_length)
        if state.step == self.first_step:
            self.log.restart_clock()  # the first step includes one-time initialization
        metrics = {loss_name(b, config.model.num_layers): loss for b, loss in losses.items()}
        metrics |= {LEARNING_RATE: rate, GRAD_NORM: grad_norm}
        self.bad_steps = 0 if updated else self.bad_steps + 1
        if not updated:
            state.skipped_steps += 1
            self.log.event(state.step, "skipped", **metrics)
        if _is_due(state.step, config.logging.interval) or state.step == config.training.steps:
            [peak_bytes] = max_over_ranks(distributed.peak_memory_bytes())
            totals = {SKIPPED: state.skipped_steps, PEAK_MEMORY: peak_bytes / 2**30}
            self.log.report(state.step, metrics | totals)
        if self.bad_steps >= config.training.max_bad_steps:
            self.give_up(metrics)

    def compute_gradients(self, batches: Sequence[Microbatch]) -> dict[int, float]:
        """Compute the gradients of a step and return its losses; trace the step if configured."""
        step, config = self.state.step, self.config
        if step + 1 not in config.logging.trace_steps:
            return self.model.forward_backward(batches, step)
        path = Path(config.output) / f"trace-{step + 1:08}.json"
        return traced_step(self.model, batches, step, path)

    def give_up(self, metrics: dict[str, float]) -> None:
        self.save()
        self.log.event(self.state.step, "stopped")
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        assert self.saved is not None
        raise TrainingStopped(
            f"{self.bad_steps} steps in a row (training.max_bad_steps) had a loss or gradient that "
            f"is not finite (in the last step: {shown}), or no valid token, which makes the loss "
            f"NaN. None of these steps changed the model, which is saved in {self.saved[1]}. Try a "
            "lower optimizer.lr, more optimizer.warmup_steps or float32."
        )

    def save_interrupted(self, name: str) -> None:
        step = self.state.step
        if step and (self.saved is None or self.saved[0] != step):
            self.save()
        self.log.event(step, "interrupted", signal=name)
        where = "nothing to save" if self.saved is None else f"saved in {self.saved[1]}"
        logger.info("stopped by %s after step %d: %s", name, step, where)
        max_over_ranks(0)  # waits: a launcher may kill the other ranks as soon as one of them ends

    def validate(self) -> None:
        """Report every exit's loss and agreement on the validation data, if there is any."""
        if self.validation_data is None:
            return
        with during(f"the validation after step {self.state.step}"):
            validation = self.model.evaluate(self.common_batches(self.validation_data))
        self.log.report_validation(
            self.state.step, validation_metrics(validation, self.config.model.num_layers)
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
                self.frozen_fingerprint,
                self.files,
            )
        self.saved = self.state.step, path
        self.frozen = self.frozen and path
        self.frozen_fingerprint = self.fingerprint_frozen()
        self.log.event(self.state.step, "saved", checkpoint=str(path))
        self.log.restart_clock()

    def fingerprint_frozen(self) -> str | None:
        """Return the fingerprint of the checkpoint with the frozen parameters, if there is one.

        A save compares it, because another checkpoint may have taken the place of this one.
        """
        if (frozen := self.frozen) is None:
            return None
        return run_on_rank_zero(lambda: TensorReader(frozen).fingerprint())


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
    """Replace the dtype "auto" by that of `source`, or the best one for this device."""
    name: str = config.training.dtype
    if name == "auto" and source is not None:
        name = run_on_rank_zero(lambda: TensorReader(source).config().training.dtype)
    if name == "auto":
        name = choose_dtype(config)
    values = config.model_dump()
    values["training"]["dtype"] = name
    return load_config(None, values)  # checks again: some options depend on the dtype


def _open_log(config: Config, start_step: int, grid: distributed.Grid) -> RunLog:
    if grid.rank == 0:
        replace_text(Path(config.output) / "config.toml", config.to_toml())
    return RunLog(config, start_step=start_step, is_logging=grid.rank == 0)
