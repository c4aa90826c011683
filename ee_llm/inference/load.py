"""From a checkpoint to an engine on this rank's device, whatever layout saved it."""

import torch

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.inference.engine import DeferralMode, Engine
from ee_llm.inference.engine_base import Detokenize, EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.scheduling.scheduler import SchedulerConfig


def load_engine(
    reader: TensorReader,
    dtype: torch.dtype | None = None,
    scheduler_config: SchedulerConfig | None = None,
    decode: Detokenize | None = None,
    deferral: DeferralMode = "auto",
    ranks: distributed.InferenceGrid | None = None,
    execution: ExecutionConfig | None = None,
) -> EngineBase:
    """Return an engine for the model of a checkpoint; over pipeline stages if `ranks` has them.

    dtype: None for the fastest of this device. The others are as for `Engine`, on stages nothing is
    held. Raises RequestError for a damaged checkpoint, one that the ranks can not share out, or an
    execution that the device does not have.
    """
    config, tensors, device = reader.config(), CheckpointTensors(reader), distributed.device()
    dtype = dtype or distributed.fast_dtype()
    if ranks is not None and ranks.num_stages > 1:
        return PipelineEngine(
            config, tensors, ranks, dtype, scheduler_config, decode, device, execution
        )
    return Engine(
        config, tensors, dtype, scheduler_config, decode, device, deferral, ranks, execution
    )
