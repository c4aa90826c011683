"""The sections of a configuration, and what follows from them."""

from pydantic import Field

from ee_llm.config import toml
from ee_llm.config.base import PathText, Section, option
from ee_llm.config.deepspeed import DeepSpeedConfig
from ee_llm.config.model import ModelConfig
from ee_llm.config.sections import (
    CheckpointConfig,
    DataConfig,
    ExitsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from ee_llm.config.tuning import TuningConfig
from ee_llm.errors import ConfigError


class ConfigFields(Section):
    """The sections of a configuration, each valid in itself; `Config` checks them together."""

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
