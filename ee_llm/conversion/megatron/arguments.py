"""Converts the arguments in a checkpoint of Megatron-LM or EE-LLM to options.

They are the command-line arguments, with underscores. If a version does not have an argument yet,
the default here is the only behaviour of that version.
"""

from typing import Any

from ee_llm.conversion.values import (
    Settings,
    SettingsError,
    check_values,
    flag,
    read_counts,
    to_number,
)

# Arguments that change the function or the tensors of the model: the only supported value.
_SUPPORTED: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "is_hybrid_model": False,
    "linear_attention_freq": None,
    "linear_attention_type": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_experts": None,
    "qk_l2_norm": False,
    "quick_geglu": False,
    "retro_add_retriever": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "softmax_type": "vanilla",
    "squared_relu": False,
    "window_size": None,
}


def read_model(arguments: Settings) -> tuple[dict[str, Any], list[str]]:
    """Return the options of `model`, and notes; raises SettingsError naming an argument."""
    check_values(arguments, **_SUPPORTED)
    layers, hidden, heads, length, padded = read_counts(
        arguments,
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "padded_vocab_size",
    )
    is_llama = _is_llama(arguments)
    epsilon = arguments.get("norm_epsilon", arguments.get("layernorm_epsilon", 1e-5))
    vocabulary, notes = _vocabulary(arguments, padded)
    options = {
        "family": "llama" if is_llama else "gpt",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": _groups(arguments, heads),
        "vocab_size": vocabulary,
        "max_seq_length": length,
        "norm_eps": to_number("norm_epsilon", epsilon),
        "tie_embeddings": not flag(arguments, "untie_embeddings_and_output_weights"),
        "init_std": to_number("init_method_std", arguments.get("init_method_std", 0.02)),
        **_position(arguments),
    }
    for ours, theirs in (("head_dim", "kv_channels"), ("ffn_hidden_size", "ffn_hidden_size")):
        if arguments.get(theirs) is not None:
            (options[ours],) = read_counts(arguments, theirs)
    if is_llama:
        options["qkv_bias"] = flag(arguments, "add_qkv_bias")
    else:
        options["gelu"] = _gelu(arguments)
    if flag(arguments, "qk_layernorm"):
        options["qk_norm"] = True  # the configuration rejects it for gpt, where it is a LayerNorm
    return options, notes


def read_exits(arguments: Settings, num_layers: int) -> dict[str, Any]:
    """Return the options of `exits` of an EE-LLM model, or {} for other models.

    Layers are counted from 1. A post-exit at layer n reads the layer's output, at boundary n, and a
    pre-exit its input, at boundary n - 1. Raises SettingsError naming an argument.
    """
    numbers = exit_layers(arguments)
    if not numbers:
        return {}
    is_pre = flag(arguments, "pre_exit")
    boundaries = [number - is_pre for number in numbers]
    shown = f"exit_layer_nums = {numbers} with pre_exit = {is_pre}"
    for number, boundary in zip(numbers, boundaries, strict=True):
        if not 1 <= boundary < num_layers:
            raise SettingsError(
                f"{shown}: the exit of layer {number} is at boundary {boundary}. Expected a "
                f"boundary from 1 to {num_layers - 1}, before the final exit at num_layers = "
                f"{num_layers}."
            )
    if len(set(numbers)) < len(numbers):
        raise SettingsError(f"{shown}: a layer occurs twice")
    head = [part for part in ("block", "mlp", "norm") if flag(arguments, f"use_exit_{part}")]
    if {"block", "mlp"} <= set(head):
        raise SettingsError(
            "use_exit_mlp and use_exit_block together cannot be converted: in EE-LLM the block "
            "comes after the MLP, in exits.head before it"
        )
    if "mlp" in head and is_pre:
        raise SettingsError(
            "use_exit_mlp with pre_exit cannot be converted: a pre-exit has no layer whose MLP it "
            "could replace"
        )
    is_own = flag(arguments, "untie_exit_output_weights")
    if not is_own and flag(arguments, "untie_embeddings_and_output_weights"):
        raise SettingsError(
            "untie_exit_output_weights = False with untie_embeddings_and_output_weights = True "
            "cannot be converted: expected exits with their own output weights"
        )
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    options: dict[str, Any] = {
        "boundaries": [boundaries[i] for i in order],
        "placement": "pre" if is_pre else "post",
        "head": head,
        "output": "own" if is_own else "tied",
    }
    for ours, theirs in (("weights", "weight"), ("temperatures", "temperature")):
        if values := _list(arguments, f"exit_layer_{theirs}"):
            if len(values) != len(numbers):
                raise SettingsError(f"exit_layer_{theirs} = {values}: expected one value per exit")
            options[ours] = [to_number(f"exit_layer_{theirs}", values[i]) for i in order]
    return options


def exit_layers(arguments: Settings) -> list[int]:
    """Return the layers with exits, in the order of their output weights; raises SettingsError."""
    numbers = _list(arguments, "exit_layer_nums")
    if not all(type(number) is int for number in numbers):
        raise SettingsError(f"exit_layer_nums = {numbers!r}: expected numbers of layers")
    return numbers


def _list(arguments: Settings, name: str) -> list[Any]:
    values = arguments.get(name) or []
    if not isinstance(values, list | tuple):
        raise SettingsError(f"{name} = {values!r}: expected a list")
    return list(values)


def _is_llama(arguments: Settings) -> bool:
    has_bias = flag(arguments, "add_bias_linear", True)
    if flag(arguments, "disable_bias_linear"):  # the older name
        has_bias = False
    found = (
        arguments.get("normalization", "LayerNorm"),
        flag(arguments, "swiglu"),
        has_bias,
    )
    if found == ("RMSNorm", True, False):
        return True
    if found == ("LayerNorm", False, True):
        check_values(arguments, add_qkv_bias=False)
        return False
    names = ("normalization", "swiglu", "add_bias_linear")
    shown = ", ".join(f"{name} = {value}" for name, value in zip(names, found, strict=True))
    raise SettingsError(
        f"{shown} cannot be converted; only RMSNorm, True, False (llama) and LayerNorm, False, "
        "True (gpt) can"
    )


def _gelu(arguments: Settings) -> str:
    """Return the kind of GELU; the fused kernel of bias and GELU approximates it by tanh."""
    if flag(arguments, "openai_gelu"):
        return "tanh"
    if flag(arguments, "onnx_safe"):
        return "erf"
    return "tanh" if flag(arguments, "bias_gelu_fusion", True) else "erf"


def _groups(arguments: Settings, heads: int) -> int:
    # Without the flag, num_query_groups is a default that nothing reads.
    if not flag(arguments, "group_query_attention"):
        return heads
    (groups,) = read_counts(arguments, "num_query_groups")
    size = arguments.get("tensor_model_parallel_size") or 1
    if groups % size:
        raise SettingsError(
            f"num_query_groups = {groups} with tensor_model_parallel_size = {size} cannot be "
            "converted, because ranks share keys and values"
        )
    return groups


def _position(arguments: Settings) -> dict[str, Any]:
    kind = arguments.get("position_embedding_type", "learned_absolute")
    if flag(arguments, "use_rotary_position_embeddings"):
        kind = "rope"
    if kind == "learned_absolute":
        check_values(arguments, add_position_embedding=True)
        return {"position": "learned"}
    if kind != "rope":
        raise SettingsError(
            f"position_embedding_type = {kind!r} cannot be converted; only learned_absolute and "
            "rope can"
        )
    base = to_number("rotary_base", arguments.get("rotary_base", 10000))
    options: dict[str, Any] = {"position": "rope", "rope_theta": base}
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    if flag(arguments, "use_rope_scaling"):
        if factor is not None:
            raise SettingsError(
                f"rotary_seq_len_interpolation_factor = {factor} and use_rope_scaling both scale "
                "rotary positions; only one of them can be converted"
            )
        given = arguments.get("rope_scaling_factor", 8.0)
        return options | {
            "rope_scaling": "llama3",
            "rope_factor": to_number("rope_scaling_factor", given),
        }
    if factor is not None:
        factor = to_number("rotary_seq_len_interpolation_factor", factor)
        options |= {"rope_scaling": "linear", "rope_factor": factor}
    return options


def _vocabulary(arguments: Settings, padded: int) -> tuple[int, list[str]]:
    """Return the vocabulary size, with a note if the embedding is padded for equal shards."""
    if arguments.get("vocab_size") is None:
        return padded, []
    (size,) = read_counts(arguments, "vocab_size")
    if str(arguments.get("tokenizer_type")).startswith("Null"):
        size += 1  # it adds an end-of-document token
    if size > padded:
        raise SettingsError(f"vocab_size = {size} is above padded_vocab_size = {padded}")
    if size == padded:
        return size, []
    return size, [
        f"model.vocab_size = {size}: rows {size} to {padded - 1} of embedding and output, which "
        "belong to no token, are removed. The other tokens share their probability."
    ]
