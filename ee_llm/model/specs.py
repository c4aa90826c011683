"""The megatron-core configuration and layer specs of a model."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.config import Config, ModelConfig

distributed.enable_megatron()
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from ee_llm.model.activation import NoActivation, SwiGluLinear
from ee_llm.model.attention import CausalAttention
from ee_llm.model.linear import ColumnLinear, RowLinear
from ee_llm.model.rotary import RotarySelfAttention

# Transformer Engine stores the parameters of a norm in the linear layer that follows it.
FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@functools.cache
def _has_transformer_engine() -> bool:
    if not distributed.has_cuda():
        return False  # The CPU meta package raises RuntimeError on import.
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


_tanh_gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")


def _activation(model: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.family == "llama":
        return torch.nn.functional.silu
    return torch.nn.functional.gelu if model.gelu == "erf" else _tanh_gelu


def transformer_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Return megatron-core's configuration of a layer of the model in `dtype`.

    It does not mention pipeline parallelism, which ee_llm implements itself.
    """
    model, parallel = config.model, config.parallel
    llama = model.family == "llama"
    fused = distributed.has_cuda() and dtype == torch.bfloat16
    recompute: dict[str, Any] = {}
    if config.training.recompute == "selective":
        # Exclude MLPs with a bias: they return the bias parameter, which megatron-core's checkpoint
        # would turn into its own output. Its backward pass then loops until memory is exhausted.
        modules = ["core_attn", "mlp"] if llama else ["core_attn"]
        recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=not llama,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=llama,
        activation_func=_activation(model),
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not distributed.has_cuda(),
        init_method=_keep,  # ee_llm.model.initialize sets every parameter.
        output_layer_init_method=_keep,
        calculate_per_token_loss=True,  # Sum gradients over ranks: losses are normalized.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=fused,
        # megatron-core's fused GELU is the tanh approximation and rounds differently from torch's.
        bias_activation_fusion=fused and llama,
        use_te_activation_func=llama and not fused,  # SwiGluLinear
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **recompute,
    )


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Norm:
    """Constructs torch's RMSNorm or LayerNorm, marked for summing sequence-parallel gradients."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, device=distributed.device(), dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def mlp_spec(config: TransformerConfig) -> ModuleSpec:
    """Return the spec of an MLP without its norm."""
    is_swiglu = config.use_te_activation_func
    parts = MLPSubmodules(
        linear_fc1=SwiGluLinear if is_swiglu else ColumnLinear,
        linear_fc2=RowLinear,
        activation_func=NoActivation if is_swiglu else None,
    )
    return ModuleSpec(module=MLP, submodules=parts)


def uses_transformer_engine(config: TransformerConfig) -> bool:
    """Return whether layers use Transformer Engine: in bfloat16, if it is available."""
    return config.bf16 and _has_transformer_engine()


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return the spec of a transformer layer."""
    if uses_transformer_engine(config):
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        spec.submodules.sharded_state_dict_keys_map = FUSED_NORM_NAMES
        return spec
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnLinear,
        core_attention=CausalAttention,
        linear_proj=RowLinear,
        q_layernorm=Norm if config.qk_layernorm else IdentityOp,
        k_layernorm=Norm if config.qk_layernorm else IdentityOp,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp_spec(config),
            mlp_bda=get_bias_dropout_add,
        ),
    )
