"""Token and position embeddings.

Shapes: s sequence, b microbatch, h hidden, t tensor-parallel ranks.
"""

import torch

from ee_llm import distributed
from ee_llm.config import ModelConfig
from ee_llm.model.dropout import hidden_region

distributed.enable_megatron()
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Embedding(MegatronModule):
    """Word embeddings and, on the first stage, learned position embeddings, if the model has them.

    Other stages have an embedding only for its weight, which is tied to the outputs of exits.
    """

    def __init__(self, config: ModelConfig, parts: TransformerConfig, with_positions: bool) -> None:
        super().__init__(config=parts)
        self.word = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, init_method=parts.init_method, config=parts
        )
        self.position = None
        if with_positions and config.position == "learned":
            self.position = torch.nn.Embedding(
                config.max_seq_length,
                config.hidden_size,
                device=distributed.device(),
                dtype=parts.params_dtype,
            )

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return [s, b, h] ([s / t, b, h] if sequence parallel) from tokens, positions [b, s]."""
        hidden = self.word(tokens)
        if self.position is not None:
            hidden = hidden + self.position(positions)
        hidden = hidden.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        dropout = self.config.hidden_dropout
        if not self.training or dropout == 0:
            return hidden
        with hidden_region(self.config, self.training):
            return torch.nn.functional.dropout(hidden, dropout)
