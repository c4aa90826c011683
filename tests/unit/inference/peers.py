"""Load weights into models of transformers; tests that use it are skipped without it."""

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.config import Config
from tests.unit.inference.models import split_qkv
from tools.bench.llama import llama_config, llama_weights


def llama_of_transformers(config: Config, tensors: dict[str, Tensor]):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(llama_config(config)).double()
    theirs.load_state_dict(llama_weights(config, tensors), strict=True)
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
                # GPT-2 stores transposed linear weights.
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


def make_precise(theirs) -> None:
    """Compute in float64 what transformers computes in float32 regardless of the dtype."""
    if hasattr(theirs, "model"):  # GPT-2 has no rotary embedding and uses torch's norms
        theirs.model.rotary_emb = _PreciseRotary(theirs.model.rotary_emb.inv_freq)
    for parent in list(theirs.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
