"""From a checkpoint to an engine on this rank's device, whatever layout saved it."""

import torch

from ee_llm import platform
from ee_llm.checkpoint.read import TensorReader
from ee_llm.inference.decoder import Decode, Decoder
from ee_llm.inference.engine import Engine, Hold
from ee_llm.inference.execution import Execution
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.scheduler import Limits
from ee_llm.inference.weights import CheckpointTensors


def load_engine(
    reader: TensorReader,
    dtype: torch.dtype | None = None,
    limits: Limits | None = None,
    decode: Decode | None = None,
    hold: Hold = "auto",
    ranks: platform.ServingGrid | None = None,
    execution: Execution | None = None,
) -> Decoder:
    """Return an engine for the model of a checkpoint; over pipeline stages if `ranks` has them.

    dtype: None for the fastest of this device. The others are as for `Engine`, on stages nothing is
    held. Raises ValueError for a damaged checkpoint, one that the ranks can not share out, or an
    execution that the device does not have.
    """
    config, tensors, device = reader.config(), CheckpointTensors(reader), platform.device()
    dtype = dtype or platform.fast_dtype()
    if ranks is not None and ranks.num_stages > 1:
        return PipelineEngine(config, tensors, ranks, dtype, limits, decode, device, execution)
    return Engine(config, tensors, dtype, limits, decode, device, hold, ranks, execution)
