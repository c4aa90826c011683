"""The functions of the Python API; the command line is a thin layer over the same parts.

`import ee_llm` offers them, and imports what they need when they are first used. `probe` is in
`ee_llm.evaluation.probe.api`.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ee_llm.config import Config, HeadPart, load_config
from ee_llm.conversion.convert import ConversionResult
from ee_llm.conversion.convert import convert as _convert
from ee_llm.conversion.options import ConvertOptions
from ee_llm.errors import ConfigError, RunError, naming_arguments
from ee_llm.evaluation.calibration.options import CalibrateOptions, Metric
from ee_llm.evaluation.calibration.result import CalibrationResult
from ee_llm.evaluation.options import EvaluateOptions, listed
from ee_llm.evaluation.result import EvaluationResult
from ee_llm.inference.choices import DtypeName, Measure
from ee_llm.pipeline.planner.report import PlanReport
from ee_llm.pipeline.planner.report import plan as _plan
from ee_llm.training.start import load_tuning_config, prepare


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run.

    Attributes:
        output: Run directory.
        checkpoint: Directory of the last checkpoint, which you can pass to `LLM`.
        losses: The last reported loss of every exit.
    """

    output: Path
    checkpoint: Path
    losses: Mapping[str, float]

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of the run's log (log.jsonl), such as losses by step."""
        return _read_log(self.output)

    def __repr__(self) -> str:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        return f"TrainingResult({str(self.checkpoint)!r}: {losses})"


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["ee-llm", "hf", "int8"] = "ee-llm",
    exits: Sequence[int] | int = (),
    head: Sequence[HeadPart] | HeadPart = ("norm",),
    exit_output: Literal["shared", "own", "tied"] = "shared",
    dense: bool = False,
    truncate_at: int | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    revision: str | None = None,
    max_shard_gb: float = 5.0,
    check: bool = False,
    text: str | None = None,
    progress: bool = True,
) -> ConversionResult:
    """Convert a model from Hugging Face, GGUF or Megatron-LM, or export a checkpoint.

    Args:
        source: A folder with config.json, a .gguf file, a hub id such as org/name, a Megatron-LM
            or EE-LLM checkpoint, or a checkpoint or run directory of ee_llm.
        output: Directory to create: a run directory, or with to="hf" a folder for transformers.
        to: Format of the result: a checkpoint of ee_llm, a folder for transformers ("hf"), or a
            checkpoint with linear weights in 8 bits ("int8").
        exits: Layers after which to add early exits. Tune these afterwards.
        head: Modules of the new exits, each copied from the model.
        exit_output: Output weight of the new exits.
        dense: Remove the exits of a checkpoint of ee_llm.
        truncate_at: Cut a checkpoint of ee_llm to the model that ends with the exit after this
            layer.
        tokenizer: Tokenizer of a model that comes without one: "bytes" or a path.
        strict: Refuse settings of config.json whose meaning is unknown.
        dtype: Type of the dequantized weights of a GGUF file.
        revision: Branch, tag or commit of a model on the Hugging Face hub.
        max_shard_gb: With to="hf", size in GB at which a new file begins.
        check: Compare the logits of every exit before and after, with transformers.
        text: Text on which `check` compares the logits.
        progress: Show a progress bar in terminals.

    Raises:
        UserError: The source has no model that can be converted, or an argument is not valid.
    """
    values: dict[str, Any] = {
        "source": source,
        "output": output,
        "to": to,
        "exits": listed(exits),
        "head": listed(head),
        "exit_output": exit_output,
        "dense": dense,
        "truncate_at": truncate_at,
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "strict": strict,
        "dtype": dtype,
        "revision": revision,
        "max_shard_gb": max_shard_gb,
        "check": check,
        "text": text,
    }
    try:
        options = TypeAdapter(ConvertOptions).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"{name} = {values[name]!r}: {first['msg']}.") from None
    with naming_arguments(values):
        return _convert(options, progress=progress)


def train(
    config: Config | str | Path | Mapping[str, Any], *, nproc: int | None = None
) -> TrainingResult:
    """Train a model, or resume the run if its directory has a checkpoint.

    Args:
        config: A configuration, a TOML file, or options by name, such as
            {"model.shape": "llama-tiny", "output": "runs/first"}.
        nproc: Number of processes to start on this machine, a multiple of parallel.tensor x
            parallel.pipeline. None trains in this process.

    Raises:
        UserError: The configuration, the data or a checkpoint is not valid.
        RunError: The run failed or was stopped by a signal.
    """
    found = _config(config)
    if found.is_tuning:
        raise ConfigError(
            f"tuning.checkpoint = {found.tuning.checkpoint} belongs to tuning. Use ee_llm.tune."
        )
    return _run(found, "train", nproc)


def tune(
    checkpoint: str | Path | None = None,
    *,
    output: str | Path | None = None,
    data: Sequence[str | Path] | str | Path = (),
    config: str | Path | None = None,
    nproc: int | None = None,
    **options: Any,
) -> TrainingResult:
    """Train exits of an existing model with all other parameters frozen (EE-Tuning).

    Args:
        checkpoint: Checkpoint or run directory of the model.
        output: Run directory to write. None writes to that of `config`, or to runs/default.
        data: Prefixes of token files that `ee-llm data prepare` wrote.
        config: TOML file with further options. The other arguments take precedence.
        nproc: Number of processes to start on this machine. None trains in this process.
        options: Further options by section, such as exits={"boundaries": [8]} or
            training={"steps": 200}.

    Raises:
        UserError: The configuration, the data or the checkpoint is not valid.
        RunError: The run failed or was stopped by a signal.
    """
    prefixes = listed(data)
    overrides: dict[str, Any] = dict(options)
    if checkpoint is not None:
        overrides["tuning.checkpoint"] = str(checkpoint)
    if output is not None:
        overrides["output"] = str(output)
    if prefixes:
        overrides["data.prefixes"] = [str(prefix) for prefix in prefixes]
    return _run(load_tuning_config(config, overrides), "tune", nproc)


def evaluate(
    checkpoint: str | Path,
    *,
    data: Sequence[str | Path] | str | Path = (),
    text: Sequence[str | Path] | str | Path = (),
    num_tokens: int | None = None,
    seq_length: int | None = None,
    dtype: DtypeName = "auto",
    tensor: int = 1,
    pipeline: int = 1,
    timeout_s: float = 600.0,
    progress: bool = True,
) -> EvaluationResult:
    """Measure the loss of every exit on given text, and how often it agrees with the final exit.

    With tensor x pipeline > 1, this starts that many processes on this machine, unless a launcher
    such as torchrun has already started them. In this case, all of them call this function, and
    all of them get the result.

    Args:
        checkpoint: Checkpoint directory, or run directory, whose newest checkpoint is used.
        data: Prefixes of token files that `ee-llm data prepare` wrote.
        text: Files or folders of plain text, JSON or Parquet, instead of `data`. The checkpoint's
            tokenizer encodes them.
        num_tokens: Number of tokens to predict, from the start of the text. None means all.
        seq_length: Length of a window in tokens. The model sees no token before the window. None
            means the checkpoint's data.seq_length, at most 2048.
        dtype: Dtype of the computation; "auto" is bfloat16 where the device supports it in
            hardware, else float32. Sums are float64.
        tensor: Number of tensor-parallel ranks of each pipeline stage.
        pipeline: Number of pipeline stages.
        timeout_s: Maximum number of seconds to wait for another rank.
        progress: Show a progress bar in terminals.

    Raises:
        UserError: An argument, the text or the checkpoint is not valid.
        RunError: The loss of an exit is not finite, or a rank failed.
    """
    from ee_llm.evaluation.evaluate import evaluate as _evaluate

    options = EvaluateOptions(
        Path(checkpoint),
        tuple(map(str, listed(data))),
        tuple(map(Path, listed(text))),
        num_tokens,
        seq_length,
        dtype,
        tensor,
        pipeline,
        timeout_s,
        progress,
    )
    return _evaluate(options)


def calibrate(
    checkpoint: str | Path,
    *,
    data: Sequence[str | Path] | str | Path = (),
    text: Sequence[str | Path] | str | Path = (),
    task: Sequence[str | Path] | str | Path = (),
    risk: float = 0.05,
    delta: float = 0.05,
    metric: Metric = "agreement",
    measure: Measure = "max_probability",
    train_gate: bool = False,
    gate_tokens: int = 50_000,
    num_tokens: int | None = None,
    seq_length: int | None = None,
    dtype: DtypeName = "auto",
    seed: int = 0,
    tensor: int = 1,
    pipeline: int = 1,
    timeout_s: float = 600.0,
    progress: bool = True,
) -> CalibrationResult:
    """Choose thresholds for the exits that keep a stated risk, with a guarantee.

    Half of the text is searched for thresholds that save much, and the other half tests them, from
    the safest to the boldest (Learn then test, arXiv 2110.01052, with the test of arXiv
    2010.09686). If none passes, all exits are off. Starts processes like `evaluate`.

    Args:
        checkpoint: Checkpoint directory, or run directory, whose newest checkpoint is used.
        data: Prefixes of token files that `ee-llm data prepare` wrote. Use text that did not train
            the exits.
        text: Files or folders of plain text, JSON or Parquet, instead of `data`.
        task: Files with questions, instead of text, for the metric "task": JSON Lines with "prompt"
            and "answer".
        risk: Greatest risk, in terms of `metric`.
        delta: Greatest probability that the risk is exceeded, over the choice of the text.
        metric: What the risk is about: "agreement" is the share of tokens whose exit disagrees with
            the final exit about the most probable token, "perplexity" the relative increase of the
            perplexity, "task" the share of right answers that are lost.
        measure: Measure of confidence, as in `ExitPolicy`.
        train_gate: Train a gate for each exit on the first `gate_tokens` tokens, save the gates in
            the checkpoint, and calibrate them on the rest of the text.
        gate_tokens: Number of tokens that train the gates.
        num_tokens: Number of tokens to use, from the start of the text. None means all.
        seq_length: Length of a window in tokens. None means the checkpoint's data.seq_length, at
            most 2048. Shorter windows are more samples, and allow smaller risks.
        dtype: Dtype of the computation, as in `evaluate`.
        seed: Seed of the random split of the text.
        tensor: Number of tensor-parallel ranks of each pipeline stage.
        pipeline: Number of pipeline stages.
        timeout_s: Maximum number of seconds to wait for another rank.
        progress: Show a progress bar in terminals.

    Raises:
        UserError: An argument, the text or the checkpoint is not valid, or the text is too short
            for the risk.
        RunError: The loss of an exit is not finite, or a rank failed.
    """
    from ee_llm.evaluation.calibration.calibrate import calibrate as _calibrate

    options = CalibrateOptions(
        Path(checkpoint),
        data=tuple(map(str, listed(data))),
        text=tuple(map(Path, listed(text))),
        num_tokens=num_tokens,
        seq_length=seq_length,
        dtype=dtype,
        tensor=tensor,
        pipeline=pipeline,
        timeout_s=timeout_s,
        progress=progress,
        task=tuple(map(Path, listed(task))),
        risk=risk,
        delta=delta,
        metric=metric,
        measure=measure,
        train_gate=train_gate,
        gate_tokens=gate_tokens,
        seed=seed,
    )
    return _calibrate(options)


def plan(
    config: Config | str | Path | Mapping[str, Any], *, nproc: int | None = None
) -> PlanReport:
    """Predict the pipeline schedule of a training run: its order, times and memory.

    Args:
        config: A configuration, a TOML file, or options by name.
        nproc: Number of processes of the run. None means parallel.tensor x parallel.pipeline.

    Raises:
        UserError: The configuration is not valid.
    """
    found = _config(config)
    size = found.parallel.tensor * found.parallel.pipeline if nproc is None else nproc
    return _plan(found, num_microbatches=found.num_microbatches(size))


def _config(config: Config | str | Path | Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return load_config(None, config)
    return load_config(config)


def _run(config: Config, command: str, nproc: int | None) -> TrainingResult:
    with naming_arguments(("nproc", "output")):
        config = prepare(config, nproc)
    if nproc is None:
        from ee_llm.training.trainer import TrainingInterrupted
        from ee_llm.training.trainer import train as train_as_rank

        try:
            return _result(config, train_as_rank(config))
        except TrainingInterrupted as stop:
            raise RunError(
                f"{stop.signal.name} stopped the run {config.output} after a complete step, and its"
                " state is saved. Call this function again to resume it."
            ) from None
    from ee_llm.checkpoint.directory import find_latest
    from ee_llm.launch.local import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(config.to_toml())
        outcome = run_ranks(nproc, [command, "--config", str(path)])
    if outcome is not None:
        raise outcome.error()
    checkpoint = find_latest(config.output)
    if checkpoint is None:
        raise RunError(f"The run {config.output} has no checkpoint.")
    return _result(config, checkpoint)


def _result(config: Config, checkpoint: Path) -> TrainingResult:
    output = Path(config.output)
    losses: dict[str, float] = {}
    for record in _read_log(output):
        found = {name: value for name, value in record.items() if name.endswith(" loss")}
        # JSON has no NaN: the log has null.
        losses |= {name: math.nan if value is None else value for name, value in found.items()}
    return TrainingResult(output, checkpoint, losses)


def _read_log(output: Path) -> list[dict[str, Any]]:
    text = (output / "log.jsonl").read_text()
    complete = text[: text.rfind("\n") + 1]  # A run that still writes has a partial last line.
    return [json.loads(line) for line in complete.splitlines()]
