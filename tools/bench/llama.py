"""Convert a Llama to transformers: its configuration, and its weights under their names."""

from typing import Any

from torch import Tensor

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.config import Config


def llama_config(config: Config, **options: Any) -> Any:
    """Return the LlamaConfig of a model. `options` are additional arguments of LlamaConfig."""
    from transformers import LlamaConfig

    shape = config.model
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_seq_length,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
        **options,
    )


def llama_weights(config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under transformers' names, with fused weights split."""
    shape = config.model
    state = {
        "model.embed_tokens.weight": tensors["embedding.word.weight"],
        "model.norm.weight": tensors[f"exits.{shape.num_layers}.norm.weight"],
        "lm_head.weight": tensors[output_weight_name(config, shape.num_layers)],
    }
    per_group = shape.num_heads // shape.num_kv_heads
    for number in range(1, shape.num_layers + 1):
        ours, name = f"layers.{number}", f"model.layers.{number - 1}"
        qkv = tensors[f"{ours}.self_attention.linear_qkv.weight"]
        # The weight has, for each key/value head, its query heads, then its key, then its value.
        groups = qkv.view(shape.num_kv_heads, per_group + 2, shape.head_dim, shape.hidden_size)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        for letter, part in zip("qkv", parts, strict=True):
            state[f"{name}.self_attn.{letter}_proj.weight"] = part.reshape(-1, shape.hidden_size)
        gate, up = tensors[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{name}.self_attn.o_proj.weight": tensors[f"{ours}.self_attention.linear_proj.weight"],
            f"{name}.mlp.gate_proj.weight": gate,
            f"{name}.mlp.up_proj.weight": up,
            f"{name}.mlp.down_proj.weight": tensors[f"{ours}.mlp.linear_fc2.weight"],
            f"{name}.input_layernorm.weight": tensors[f"{ours}.input_layernorm.weight"],
            f"{name}.post_attention_layernorm.weight": tensors[f"{ours}.pre_mlp_layernorm.weight"],
        }
    return state
