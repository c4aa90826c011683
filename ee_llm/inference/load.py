"""Build an engine from a checkpoint of any parallel layout, on this rank's device."""

import logging
from collections.abc import Mapping

import torch

from ee_llm import distributed
from ee_llm.checkpoint.gates import TensorsWithGates, fingerprint_with_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.inference.choices import Attention, DeferralMode, Measure
from ee_llm.inference.engine import Engine
from ee_llm.inference.engine_base import EngineBase
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.paged_attention import FLASH_BLOCK
from ee_llm.inference.pipeline_engine import PipelineEngine
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.text.detokenizer import Detokenize

logger = logging.getLogger(__name__)


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
    config, tensors, device = reader.config(), TensorsWithGates(reader), distributed.device()
    dtype = dtype or distributed.fast_dtype()
    if ranks is not None and ranks.num_stages > 1:
        return PipelineEngine(
            config, tensors, ranks, dtype, scheduler_config, detokenize, device, execution
        )
    return Engine(
        config, tensors, dtype, scheduler_config, detokenize, device, deferral, ranks, execution
    )


def policy_fingerprint(
    reader: TensorReader, measure: Measure, gates: Mapping[str, torch.Tensor] | None = None
) -> str:
    """Return the fingerprint that a policy file for a checkpoint names.

    It covers the gates if the measure of confidence uses them.

    Args:
        reader: The checkpoint.
        measure: The measure of confidence.
        gates: Gates to use instead of the checkpoint's, by name.
    """
    return fingerprint_with_gates(reader, gates) if measure == "gate" else reader.fingerprint()


def make_scheduler_config(
    max_num_seqs: int, cache_tokens: int, max_seq_length: int, attention: Attention
) -> SchedulerConfig:
    """Return the limits of the scheduler, with a cache no larger than its sequences can fill."""
    size = FLASH_BLOCK if attention == "flash" else SchedulerConfig.block_size
    num_positions = min(cache_tokens, max_num_seqs * max_seq_length)
    # Partly filled last blocks, and the block for padding.
    num_blocks = -(-num_positions // size) + max_num_seqs + 1
    return SchedulerConfig(max_num_seqs=max_num_seqs, num_blocks=num_blocks, block_size=size)


def warn_of_large_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Log a warning if the tokenizer has ids for which the model has no logits."""
    if tokenizer.vocab_size > vocab_size:
        logger.warning(
            "The tokenizer %s has %d tokens, but model.vocab_size = %d. Prompts with larger token"
            " ids are refused, and the model generates none of them. Use the tokenizer that the"
            " model was trained with.",
            tokenizer.name,
            tokenizer.vocab_size,
            vocab_size,
        )
