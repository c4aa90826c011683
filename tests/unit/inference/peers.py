"""The same weights in models of transformers; tests that ask for them are skipped without it."""

import pytest
import torch
from torch import Tensor

from ee_llm.config import Config, output_weight_name
from tests.unit.inference.models import split_qkv


def llama_of_transformers(config: Config, tensors: dict[str, Tensor]):
    transformers = pytest.importorskip("transformers")
    model = config.model
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            rms_norm_eps=model.norm_eps,
            max_position_embeddings=model.max_seq_length,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tie_embeddings,
        )
    ).double()
    state = {
        "model.embed_tokens.weight": tensors["embedding.word.weight"],
        "model.norm.weight": tensors[f"exits.{model.num_layers}.norm.weight"],
        "lm_head.weight": tensors[output_weight_name(config, model.num_layers)],
    }
    for n in range(1, model.num_layers + 1):
        ours, name = f"layers.{n}", f"model.layers.{n - 1}"
        qkv = split_qkv(config, tensors[f"{ours}.self_attention.linear_qkv.weight"])
        for part, weight in zip("qkv", qkv, strict=True):
            state[f"{name}.self_attn.{part}_proj.weight"] = weight
        gate, up = tensors[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{name}.self_attn.o_proj.weight": tensors[f"{ours}.self_attention.linear_proj.weight"],
            f"{name}.mlp.gate_proj.weight": gate,
            f"{name}.mlp.up_proj.weight": up,
            f"{name}.mlp.down_proj.weight": tensors[f"{ours}.mlp.linear_fc2.weight"],
            f"{name}.input_layernorm.weight": tensors[f"{ours}.input_layernorm.weight"],
            f"{name}.post_attention_layernorm.weight": tensors[f"{ours}.pre_mlp_layernorm.weight"],
        }
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def gpt2_of_transformers(config: Config, tensors: dict[str, Tensor]):
    transformers = pytest.importorskip("transformers")
    model = config.model
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_seq_length,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_inner=model.ffn_hidden_size,
            activation_function="gelu",
            layer_norm_epsilon=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings,
        )
    ).double()
    final = f"exits.{model.num_layers}.norm"
    state = {
        "transformer.wte.weight": tensors["embedding.word.weight"],
        "transformer.wpe.weight": tensors["embedding.position.weight"],
        "transformer.ln_f.weight": tensors[f"{final}.weight"],
        "transformer.ln_f.bias": tensors[f"{final}.bias"],
        "lm_head.weight": tensors[output_weight_name(config, model.num_layers)],
    }
    names = {
        "ln_1": "input_layernorm",
        "attn.c_attn": "self_attention.linear_qkv",
        "attn.c_proj": "self_attention.linear_proj",
        "ln_2": "pre_mlp_layernorm",
        "mlp.c_fc": "mlp.linear_fc1",
        "mlp.c_proj": "mlp.linear_fc2",
    }
    for n in range(1, model.num_layers + 1):
        for name, ours in names.items():
            for kind in ("weight", "bias"):
                tensor = tensors[f"layers.{n}.{ours}.{kind}"]
                if name == "attn.c_attn":
                    tensor = torch.cat(split_qkv(config, tensor))
                # GPT-2's linear weights lie transposed.
                state[f"transformer.h.{n - 1}.{name}.{kind}"] = (
                    tensor.t() if tensor.dim() == 2 else tensor
                )
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


class _PreciseRotary(torch.nn.Module):
    """The rotary embedding of transformers with its angles in float64."""

    def __init__(self, inverse_frequency: Tensor) -> None:
        super().__init__()
        self.inverse_frequency = inverse_frequency.double()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.inverse_frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()


def make_precise(llama) -> None:
    """Replace what transformers computes in float32 in every dtype by the same in float64."""
    llama.model.rotary_emb = _PreciseRotary(llama.model.rotary_emb.inv_freq)
    for parent in list(llama.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
