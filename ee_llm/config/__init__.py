"""Typed, strict configuration: a TOML file, overridden by the command line.

`load_config` reads and validates a configuration. Every `Config` object is valid, and all of its
sizes are concrete.
"""

from ee_llm.config.base import Section, default_text, given_type
from ee_llm.config.config import Config, option_names, section_types
from ee_llm.config.deepspeed import DeepSpeedConfig
from ee_llm.config.loading import load_config, read_options
from ee_llm.config.model import LayerDropoutConfig, ModelConfig
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
from ee_llm.config.shapes import SHAPES
from ee_llm.config.tuning import TuningConfig

__all__ = [
    "SHAPES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "ExitsConfig",
    "HeadPart",
    "LayerDropoutConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Section",
    "TrainingConfig",
    "TuningConfig",
    "default_text",
    "given_type",
    "load_config",
    "option_names",
    "read_options",
    "section_types",
]
