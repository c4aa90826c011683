"""Writes GGUF files of tiny random models, in the layout of llama.cpp's converter."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.unit.conversion.huggingface.folders import make_model

HEADS, KV_HEADS = 4, 2
SETTINGS = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_gguf(
    path: Path,
    kind: str = "llama",
    matrices: str = "F32",
    extra: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    is_odd: bool = False,
    **settings: Any,
) -> dict[str, Tensor]:
    """Write a GGUF file and return the weights of its model.

    Args:
        path: The file.
        kind: "llama" or "qwen2".
        matrices: The type of the matrices; norms and biases are F32.
        extra: Further metadata: integers, floats and strings by key.
        tensors: Further tensors.
        is_odd: Whether the tokenizer has no <|endoftext|>, which transformers then adds.
        **settings: Settings of the model that differ from SETTINGS.
    """
    import gguf

    model = make_model(kind, SETTINGS | settings)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(64)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    for key, value in (extra or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    _add_tokenizer(writer, is_odd)
    for name, value in state.items():
        data = _permuted(kind, name, value).numpy()
        ours = name
        for theirs, short in _NAMES.items():
            ours = ours.replace(theirs, short)
        if data.ndim == 2 and matrices != "F32":
            kind_of_data = gguf.GGMLQuantizationType[matrices]
            quantised = gguf.quants.quantize(data, kind_of_data)
            writer.add_tensor(ours, quantised, raw_dtype=kind_of_data)
        else:
            writer.add_tensor(ours, data)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def _permuted(kind: str, name: str, value: Tensor) -> Tensor:
    """Return queries and keys of a llama with the two halves of each head interleaved."""
    counts = {"q_proj.weight": HEADS, "k_proj.weight": KV_HEADS}
    heads = counts.get(name.rpartition("self_attn.")[2])
    if kind != "llama" or heads is None:
        return value
    halves = value.view(heads, 2, -1, value.shape[1])
    return halves.transpose(1, 2).reshape(value.shape).contiguous()


def _add_tokenizer(writer: Any, is_odd: bool) -> None:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["th", "the"]
    special = [f"<|special_{i}|>" for i in range(300 - len(letters) - len(words))]
    if not is_odd:
        special[-1] = "<|endoftext|>"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, *words, *special])
    writer.add_token_types([1] * (len(letters) + len(words)) + [3] * len(special))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(297)
    writer.add_eos_token_id(298)
    writer.add_chat_template("{% for m in messages %}<|special_0|>{{ m.content }}{% endfor %}")
