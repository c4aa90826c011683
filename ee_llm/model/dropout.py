"""Where dropout draws from: tensor ranks agree on what they all hold and differ elsewhere."""

from contextlib import AbstractContextManager, nullcontext

from ee_llm import distributed

distributed.enable_megatron()
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig


def hidden_region(config: TransformerConfig, training: bool) -> AbstractContextManager[None]:
    """Return the region in which hidden states are dropped, whole layers included.

    Tensor ranks hold the same hidden states and must draw alike, but for sequence-parallel ones:
    theirs are of other positions.
    """
    if training and config.sequence_parallel and config.hidden_dropout > 0:
        return get_cuda_rng_tracker().fork()
    return nullcontext()


def head_region(config: TransformerConfig) -> AbstractContextManager[None]:
    """Return the region in which attention scores are dropped, within a `hidden_region`.

    Tensor ranks hold other heads and must draw apart, which sequence-parallel ones do already.
    """
    return nullcontext() if config.sequence_parallel else get_cuda_rng_tracker().fork()
