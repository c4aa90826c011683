"""Typed, strict configuration: a TOML file, overridden by the command line.

`load_config` reads and checks; a `Config` that exists is sound, and all its sizes are concrete.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from ee_llm.config import checks, toml
from ee_llm.config.base import PathText, Section, default_text, option
from ee_llm.config.deepspeed import DeepSpeedConfig
from ee_llm.config.errors import ConfigError, render
from ee_llm.config.model import ModelConfig
from ee_llm.config.sections import (
    CheckpointConfig,
    DataConfig,
    ExitsConfig,
    HeadPart,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from ee_llm.config.shapes import SHAPE_FIELDS, SHAPES
from ee_llm.config.tuning import TuningConfig

__all__ = [
    "SHAPES",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DeepSpeedConfig",
    "ExitsConfig",
    "HeadPart",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Section",
    "TrainingConfig",
    "TuningConfig",
    "default_text",
    "exit_stage",
    "load_config",
    "option_names",
    "output_weight_name",
    "read_options",
    "section_types",
    "stage_layers",
]


class Config(Section):
    """Everything that decides a run. Raises `ConfigError`, one line for each problem."""

    output: PathText = option(
        "runs/default", "Run directory: checkpoints, metrics and this configuration.", min_length=1
    )
    model: ModelConfig
    exits: ExitsConfig = Field(default_factory=ExitsConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    tuning: TuningConfig = Field(default_factory=TuningConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    if not TYPE_CHECKING:  # type checkers keep the constructor that follows from the fields

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise ConfigError(render(error.errors(), option_names())) from None

        # pydantic would otherwise validate through this constructor and wrap its error once more.
        __init__.__pydantic_base_init__ = True

    @model_validator(mode="before")
    @classmethod
    def _model_is_required(cls, given: Any) -> Any:
        # So that a configuration without a model hears what a model needs.
        return {"model": {}, **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _resolve_and_check(self) -> "Config":
        if "seq_length" not in self.data.model_fields_set:
            length = {"seq_length": self.model.max_seq_length}
            object.__setattr__(self, "data", self.data.model_copy(update=length))
        if self.is_tuning and not self.tuning.exits:
            tuned = {"exits": self.exits.boundaries}
            object.__setattr__(self, "tuning", self.tuning.model_copy(update=tuned))
        found = checks.problems(self)
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def is_tuning(self) -> bool:
        """Whether exits alone are trained, on a checkpoint's model."""
        return self.tuning.checkpoint is not None

    @property
    def built_exits(self) -> tuple[int, ...]:
        """Boundaries of the exits that are built: all and the final one, or those tuned."""
        if self.is_tuning:
            return self.tuning.exits
        return (*self.exits.boundaries, self.model.num_layers)

    @property
    def depth(self) -> int:
        """Number of layers that are built: all, or those up to the last exit tuned."""
        num_layers = self.model.num_layers
        if not self.is_tuning:
            return num_layers
        # An exit behind the last layer is a mistake, told by the checks of exits.
        return min(max(self.tuning.exits, default=num_layers), num_layers)

    def to_toml(self) -> str:
        """This configuration as a TOML file that `load_config` reads back as an equal one."""
        return toml.dump(self.model_dump())

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches in one step of one data-parallel rank; raises `ConfigError`."""
        data_size = self.parallel.data_size(world_size)
        training = self.training
        at_once = training.micro_batch_size * data_size
        if training.global_batch_size % at_once:
            raise ConfigError(
                f"training.global_batch_size = {training.global_batch_size} is not divisible by "
                f"training.micro_batch_size = {training.micro_batch_size} x {data_size} "
                "data-parallel ranks; set the first to "
                f"{-(-training.global_batch_size // at_once) * at_once}, or change the number of "
                "processes"
            )
        found = training.global_batch_size // at_once
        if self.parallel.virtual > 1 and found % self.parallel.pipeline:
            whole = -(-found // self.parallel.pipeline) * self.parallel.pipeline
            raise ConfigError(
                f"training.global_batch_size = {training.global_batch_size} makes {found} "
                f"microbatches, and parallel.virtual = {self.parallel.virtual} passes them in "
                f"groups of parallel.pipeline = {self.parallel.pipeline}; set the first to "
                f"{whole * at_once}, or parallel.virtual to 1"
            )
        return found


def section_types() -> dict[str, type[Section]]:
    """The section models by name, in the order of the file."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def option_names() -> list[str]:
    """The dotted names of all options, and the names of the sections."""
    names = list(Config.model_fields)
    for section, model in section_types().items():
        names += [f"{section}.{field}" for field in model.model_fields]
    return names


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    below: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration in the TOML file `path`, with `overrides` taking precedence.

    `overrides` holds values by dotted name ("model.num_layers") or by section. A `model.shape`
    among them replaces the sizes in the file, so that naming another shape is enough. Without a
    path everything comes from the overrides and the defaults. `below` has, by section, what is
    said where neither says anything. Raises `ConfigError`.
    """
    source = "" if path is None else f"{path} with the options given" if overrides else str(path)
    try:
        return Config.model_validate(_merge(below or {}, read_options(path, overrides)))
    except ValidationError as error:
        raise ConfigError(render(error.errors(), option_names(), source)) from None


def read_options(
    path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """What the file and the overrides of `load_config` say, by section and unchecked."""
    given = _read(Path(path)) if path is not None else {}
    nested = _nest(overrides or {})
    chosen, in_file = nested.get("model"), given.get("model")
    if isinstance(chosen, dict) and chosen.get("shape") and isinstance(in_file, dict):
        given["model"] = {k: v for k, v in in_file.items() if k not in SHAPE_FIELDS}
    return _merge(given, nested)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; give a TOML file in it")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        # The nearest existing file is the likeliest mend.
        others = [str(other) for other in path.parent.glob("*.toml")]
        near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]}?" if near else "; give the path of a TOML file"
        raise ConfigError(f"{path}: no such configuration file{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path}: can not be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{path}: not TOML: {error}; strings need quotes, as in family = "llama"'
        ) from None


def _nest(overrides: Mapping[str, object]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in overrides.items():
        section, _, leaf = name.partition(".")
        if leaf:
            value = {leaf: value}
        nested = _merge(nested, {section: value})
    return nested


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged


def stage_layers(config: Config, stage: int) -> range:
    """The numbers (from 1) of the layers on a pipeline stage (from 0)."""
    num_stages = config.parallel.num_stages
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} is outside 0..{num_stages - 1}")
    each, over = divmod(config.depth, num_stages)
    even = [each + (number < over) for number in range(num_stages)]
    split = config.parallel.layer_split or even
    first = sum(split[:stage]) + 1
    return range(first, first + split[stage])


def exit_stage(config: Config, boundary: int) -> int:
    """The pipeline stage (from 0) of the exit at `boundary`; the final exit's is the last.

    A post-exit is on the stage of layer `boundary`, a pre-exit on that of the layer after it.
    """
    num_layers, num_stages = config.model.num_layers, config.parallel.num_stages
    if boundary == num_layers:
        return num_stages - 1
    if boundary not in config.exits.boundaries:
        raise ValueError(
            f"no exit at boundary {boundary}: exits.boundaries = {list(config.exits.boundaries)}"
        )
    layer = boundary if config.exits.placement == "post" else boundary + 1
    layer = min(layer, config.depth)  # no layer stands behind the last exit that is tuned
    return next(stage for stage in range(num_stages) if layer in stage_layers(config, stage))


def output_weight_name(config: Config, boundary: int) -> str:
    """The name of the [vocabulary, hidden] tensor with which the exit at `boundary` projects.

    The final exit uses the embedding's weight if they are tied, else `output.weight`. Another
    exit's is `tied` to the embedding, `shared` with the final exit, or its `own`.
    """
    final = "embedding.word.weight" if config.model.tie_embeddings else "output.weight"
    if boundary == config.model.num_layers or config.exits.output == "shared":
        return final
    tied = config.exits.output == "tied"
    return "embedding.word.weight" if tied else f"exits.{boundary}.output.weight"
