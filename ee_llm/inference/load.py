"""Build an engine from a checkpoint of any parallel layout, on this rank's device."""

import torch

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import CheckpointTensors
from ee_llm.inference.choices import DeferralMode
from ee_llm.inference.engine import Engine
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.text.detokenizer import Detokenize


def load_engine(
    reader: TensorReader,
    dtype: torch.dtype | None = None,
    scheduler_config: SchedulerConfig | None = None,
    detokenize: Detokenize | None = None,
    deferral: DeferralMode = "auto",
    ranks: distributed.InferenceGrid | None = None,
    execution: ExecutionConfig | None = None,
) -> EngineBase:
    """Return an engine for a checkpoint: a `PipelineEngine` if `ranks` has several stages.

    The arguments are those of `Engine`. With pipeline stages, `deferral` has no effect. A dtype of
    None selects the fastest one of this device.

    Raises:
        UserError: The checkpoint is damaged, the ranks cannot split the model, or the device does
            not support `execution`.
    """
    config, tensors, device = reader.config(), CheckpointTensors(reader), distributed.device()
    dtype = dtype or distributed.fast_dtype()
    if ranks is not None and ranks.num_stages > 1:
        return PipelineEngine(
            config, tensors, ranks, dtype, scheduler_config, detokenize, device, execution
        )
    return Engine(
        config, tensors, dtype, scheduler_config, detokenize, device, deferral, ranks, execution
    )
