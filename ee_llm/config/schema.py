"""The sections of a configuration and the values derived from them."""

from pydantic import Field

from ee_llm.config import toml
from ee_llm.config.base import PathText, Section, option
from ee_llm.config.deepspeed import DeepSpeedConfig
from ee_llm.config.model import LayerDropoutConfig, ModelConfig
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
    """The sections of a configuration, each valid on its own; `Config` checks them together."""

    output: PathText = option(
        "runs/default",
        "Run directory: receives the checkpoints, the log and this configuration.",
        min_length=1,
    )
    model: ModelConfig
    exits: ExitsConfig = Field(default_factory=ExitsConfig)
    layer_dropout: LayerDropoutConfig = Field(default_factory=LayerDropoutConfig)
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
        """Whether the run trains only exits, on the model of a checkpoint (EE-Tuning)."""
        return self.tuning.checkpoint is not None

    @property
    def distills(self) -> bool:
        """Whether the exits learn the distribution of the final exit."""
        return self.is_tuning and self.tuning.objective != "labels"

    @property
    def validates(self) -> bool:
        """Whether the run measures losses on validation data."""
        return self.training.eval_interval > 0 and self.data.split[1] > 0

    @property
    def is_whole(self) -> bool:
        """Whether all layers and the final exit are built.

        Tuning needs them where it compares exits with the final exit: to distill and to validate.
        """
        return not self.is_tuning or self.distills or self.validates

    @property
    def built_exits(self) -> tuple[int, ...]:
        """Boundaries of the exits to build: those to train, and the final one if `is_whole`."""
        early = self.tuning.exits if self.is_tuning else self.exits.boundaries
        return (*early, self.model.num_layers) if self.is_whole else early

    @property
    def trained_exits(self) -> tuple[int, ...]:
        """Boundaries of the exits to train: all and the final one, or only the tuned ones."""
        return self.tuning.exits if self.is_tuning else self.built_exits

    @property
    def depth(self) -> int:
        """Number of layers that a training step computes.

        These are all layers, or when tuning without distillation, those up to the last tuned exit.
        """
        num_layers = self.model.num_layers
        if not self.is_tuning or self.distills:
            return num_layers
        # The checks of exits report an exit beyond the last layer.
        return min(max(self.tuning.exits, default=num_layers), num_layers)

    def to_toml(self) -> str:
        """Return the configuration as TOML, from which `load_config` returns an equal one."""
        return toml.dump(self.model_dump())

    def num_microbatches(self, world_size: int) -> int:
        """Return the number of microbatches of one data-parallel rank in one step.

        Args:
            world_size: Number of processes of the run.

        Raises:
            ConfigError: The global batch size is not divisible by the microbatch size times the
                number of data-parallel ranks.
        """
        data_size = self.parallel.data_size(world_size)
        training = self.training
        parallel_size = training.micro_batch_size * data_size  # sequences per microbatch, all ranks
        if training.global_batch_size % parallel_size:
            raise ConfigError(
                f"training.global_batch_size = {training.global_batch_size} is not divisible by "
                f"training.micro_batch_size = {training.micro_batch_size} x {data_size} "
                "data-parallel ranks. Set it to "
                f"{-(-training.global_batch_size // parallel_size) * parallel_size}, or change the "
                "number of processes."
            )
        count = training.global_batch_size // parallel_size
        if self.parallel.virtual > 1 and count % self.parallel.pipeline:
            rounded = -(-count // self.parallel.pipeline) * self.parallel.pipeline
            raise ConfigError(
                f"training.global_batch_size = {training.global_batch_size} gives {count} "
                f"microbatches, but parallel.virtual = {self.parallel.virtual} needs a multiple of "
                f"parallel.pipeline = {self.parallel.pipeline}. Set training.global_batch_size to "
                f"{rounded * parallel_size}, or parallel.virtual to 1."
            )
        return count
