"""The functions of the Python API; the command line is a thin layer over the same parts.

`import ee_llm` offers them, and imports what they need when they are first used.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_llm.config import Config, load_config
from ee_llm.conversion.convert import ConversionResult
from ee_llm.conversion.convert import convert as _convert
from ee_llm.conversion.options import ConvertOptions
from ee_llm.errors import ConfigError, RunError
from ee_llm.pipeline.planner.report import PlanReport
from ee_llm.pipeline.planner.report import plan as _plan
from ee_llm.training.start import load_tuning_config, prepare


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run.

    Attributes:
        output: Run directory.
        checkpoint: Directory of the last checkpoint, which you can pass to `LLM`.
    """

    output: Path
    checkpoint: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        """The records of the run's log (log.jsonl), such as losses by step."""
        lines = (self.output / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> dict[str, float]:
        """The last reported loss of every exit."""
        for record in reversed(self.log):
            losses = {name: value for name, value in record.items() if name.endswith(" loss")}
            if losses:
                return losses
        return {}

    def __repr__(self) -> str:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        return f"TrainingResult({str(self.checkpoint)!r}: {losses})"


def convert(
    source: str | Path,
    output: str | Path,
    *,
    exits: Sequence[int] = (),
    progress: bool = True,
    **options: Any,
) -> ConversionResult:
    """Convert a model from Hugging Face, GGUF or Megatron-LM, or export a checkpoint.

    Args:
        source: A folder with config.json, a .gguf file, a hub id such as org/name, a Megatron-LM
            or EE-LLM checkpoint, or a checkpoint or run directory of ee_llm.
        output: Directory to create: a run directory, or with to="hf" a folder for transformers.
        exits: Layers after which to add early exits. Tune these afterwards.
        progress: Show a progress bar in terminals.
        options: Further options of `ee-llm convert`, with underscores: to, head, exit_output,
            dense, truncate_at, tokenizer, strict, dtype, revision, max_shard_gb, check, text.

    Raises:
        UserError: The source has no model that can be converted, or an option is not valid.
    """
    unknown = sorted(options.keys() - ConvertOptions.__dataclass_fields__.keys())
    if unknown:
        known = ", ".join(sorted(ConvertOptions.__dataclass_fields__))
        raise ConfigError(f"convert: option {unknown[0]!r} is unknown. Use one of {known}.")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    given = ConvertOptions(Path(source), Path(output), exits=tuple(exits), **values)
    return _convert(given, progress=progress)


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
        output: Run directory to write.
        data: Prefixes of token files that `ee-llm data prepare` wrote.
        config: TOML file with further options. The other arguments take precedence.
        nproc: Number of processes to start on this machine. None trains in this process.
        options: Further options by section, such as exits={"boundaries": [8]} or
            training={"steps": 200}.

    Raises:
        UserError: The configuration, the data or the checkpoint is not valid.
        RunError: The run failed or was stopped by a signal.
    """
    prefixes = [data] if isinstance(data, str | Path) else list(data)
    overrides: dict[str, Any] = dict(options)
    if checkpoint is not None:
        overrides["tuning.checkpoint"] = str(checkpoint)
    if output is not None:
        overrides["output"] = str(output)
    if prefixes:
        overrides["data.prefixes"] = [str(prefix) for prefix in prefixes]
    return _run(load_tuning_config(config, overrides), "tune", nproc)


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
    size = nproc or found.parallel.tensor * found.parallel.pipeline
    return _plan(found, num_microbatches=found.num_microbatches(size))


def _config(config: Config | str | Path | Mapping[str, Any]) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return load_config(None, config)
    return load_config(config)


def _run(config: Config, command: str, nproc: int | None) -> TrainingResult:
    config = prepare(config, nproc)
    if nproc is None:
        from ee_llm.training.trainer import train as train_as_rank

        return TrainingResult(Path(config.output), train_as_rank(config))
    from ee_llm.checkpoint.directory import find_latest
    from ee_llm.launch.local import launch

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(config.to_toml())
        try:
            launch(nproc, [command, "--config", str(path)])
        except SystemExit as end:
            raise RunError(
                f"The run {config.output} ended with status {end.code}. Its message is above."
            ) from None
    checkpoint = find_latest(config.output)
    if checkpoint is None:
        raise RunError(f"The run {config.output} has no checkpoint.")
    return TrainingResult(Path(config.output), checkpoint)
