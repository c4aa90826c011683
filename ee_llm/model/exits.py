"""Exit heads: [block] -> [mlp] -> [translator] -> [norm] -> output projection.

Shapes: s sequence, b microbatch, h hidden, v vocabulary, t tensor-parallel ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.config import Config
from ee_llm.model.dropout import hidden_region
from ee_llm.model.linear import ColumnLinear
from ee_llm.model.specs import Norm, layer_spec, mlp_spec

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig


class Translator(torch.nn.Module):
    """An affine map of the RMS-normalized hidden state (tuned lens, arXiv 2303.08112).

    Every tensor-parallel rank has all of it, and with sequence parallelism maps its own positions.
    """

    def __init__(self, parts: TransformerConfig) -> None:
        super().__init__()
        size = parts.hidden_size
        like = torch.empty(0, device=distributed.device(), dtype=parts.params_dtype)
        self.weight = torch.nn.Parameter(like.new_empty(size, size))
        self.bias = torch.nn.Parameter(like.new_empty(size))
        self._eps = parts.layernorm_epsilon
        for parameter in self.parameters():
            parameter.sequence_parallel = parts.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the map of hidden states [s, b, h]."""
        normalized = F.rms_norm(hidden, hidden.shape[-1:], eps=self._eps)
        return F.linear(normalized, self.weight, self.bias)


class Exit(MegatronModule):
    """The head of the exit at a boundary; the final exit has only a norm.

    An `mlp` without a block reads the residual stream of layer `boundary` after attention and
    replaces that layer's own MLP (EE-Tuning, 2402.00518); after a block, it refines the block's
    output. In both cases it has its own norm, so that a head can be trained without changing the
    layer.
    """

    def __init__(self, config: Config, parts: TransformerConfig, boundary: int) -> None:
        super().__init__(config=parts)
        self.boundary = boundary
        self.is_final = boundary == config.model.num_layers
        head = ("norm",) if self.is_final else config.exits.head
        self.taps_attention = "mlp" in head and "block" not in head
        self.temperature = 1.0
        if not self.is_final and config.exits.temperatures:
            self.temperature = config.exits.temperatures[config.exits.boundaries.index(boundary)]
        hidden_size = parts.hidden_size
        self.block: Any = None
        self.mlp_norm: Any = None
        self.mlp: Any = None
        self.translator: Any = None
        self.norm: Any = None
        if "block" in head:
            self.block = build_module(layer_spec(parts), config=parts, layer_number=boundary)
        if "mlp" in head:
            self.mlp_norm = Norm(parts, hidden_size, eps=parts.layernorm_epsilon)
            group = parallel_state.get_tensor_model_parallel_group()
            self.mlp = build_module(
                mlp_spec(parts), config=parts, ffn_hidden_size=parts.ffn_hidden_size, tp_group=group
            )
        if "translator" in head:
            self.translator = Translator(parts)
        if "norm" in head:
            self.norm = Norm(parts, hidden_size, eps=parts.layernorm_epsilon)
        owns_weight = output_weight_name(config, boundary).startswith("exits.")
        self.output = ColumnLinear(
            hidden_size,
            config.model.vocab_size,
            config=parts,
            init_method=parts.init_method,
            bias=False,
            skip_weight_param_allocation=not owns_weight,
        )

    def forward(
        self, tap: torch.Tensor, rotary: torch.Tensor | None, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the logits [s, b, v / t] of the exit.

        Args:
            tap: The exit's input [s, b, h] ([s / t, b, h] if sequence parallel).
            rotary: The rotary angles for a block, if any.
            weight: The output weight, None if the exit has its own.
        """
        hidden = tap
        if self.block is not None:
            with hidden_region(self.config, self.training):
                hidden, _ = self.block(hidden, attention_mask=None, rotary_pos_emb=rotary)
        if self.mlp is not None:
            update, bias = self.mlp(self.mlp_norm(hidden))
            hidden = hidden + (update if bias is None else update + bias)
        if self.translator is not None:
            hidden = self.translator(hidden)
        if self.norm is not None:
            hidden = self.norm(hidden)
        logits, _ = self.output(hidden, weight)
        return logits if self.temperature == 1.0 else logits / self.temperature
