"""Random number generators of dropout: equal on tensor ranks for replicated values only."""

from contextlib import AbstractContextManager, nullcontext

from ee_llm import distributed

distributed.enable_megatron()
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig


def hidden_region(config: TransformerConfig, training: bool) -> AbstractContextManager[None]:
    """Return the context for dropout of hidden states, including entire layers.

    Tensor ranks have the same hidden states and must draw the same numbers, except with sequence
    parallelism, where each rank has other positions.
    """
    if training and config.sequence_parallel and config.hidden_dropout > 0:
        return get_cuda_rng_tracker().fork()
    return nullcontext()


def head_region(config: TransformerConfig) -> AbstractContextManager[None]:
    """Return the context for dropout of attention scores, within a `hidden_region`.

    Tensor ranks have different heads and must draw different numbers. With sequence parallelism
    they already do.
    """
    return nullcontext() if config.sequence_parallel else get_cuda_rng_tracker().fork()
