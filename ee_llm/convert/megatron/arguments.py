"""The arguments that Megatron-LM and EE-LLM keep in a checkpoint, as options of ours.

They are those of the command line, with underscores. An argument that a version does not know yet
has that version's only behaviour, which is the default here.
"""

from typing import Any

from ee_llm.convert.values import Settings, SettingsError, flag, need, refuse, to_number

# What makes another function of the same tensors, or needs others; the only value that we can say.
_ONLY: dict[str, Any] = {
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
    """Return the options of `model`, and remarks; raises SettingsError naming an argument."""
    refuse(arguments, **_ONLY)
    layers, hidden, heads, length, padded = need(
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
            (options[ours],) = need(arguments, theirs)
    if is_llama:
        options["qkv_bias"] = flag(arguments, "add_qkv_bias")
    else:
        options["gelu"] = _gelu(arguments)
    if flag(arguments, "qk_layernorm"):
        options["qk_norm"] = True  # refused for gpt, where it would be LayerNorm
    return options, notes


def read_exits(arguments: Settings, num_layers: int) -> dict[str, Any]:
    """Return the options of `exits` of an EE-LLM model, none for others.

    Layers are counted from 1. A post-exit at layer n reads what comes out of it, boundary n; a
    pre-exit what goes in, boundary n - 1. Raises SettingsError naming an argument.
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
                f"{shown}: the exit of layer {number} is at boundary {boundary}; expected 1.."
                f"{num_layers - 1} (num_layers = {num_layers}, after which is the final exit)"
            )
    if len(set(numbers)) < len(numbers):
        raise SettingsError(f"{shown}: a layer is there twice")
    head = [part for part in ("block", "mlp", "norm") if flag(arguments, f"use_exit_{part}")]
    if {"block", "mlp"} <= set(head):
        raise SettingsError(
            "use_exit_mlp and use_exit_block together can not be converted: there the block comes "
            "after the MLP, and in exits.head before it"
        )
    if "mlp" in head and is_pre:
        raise SettingsError("use_exit_mlp with pre_exit can not be converted; there is no layer's")
    is_own = flag(arguments, "untie_exit_output_weights")
    if not is_own and flag(arguments, "untie_embeddings_and_output_weights"):
        raise SettingsError(
            "untie_exit_output_weights = False with untie_embeddings_and_output_weights = True: "
            "expected exits with weights of their own"
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
                raise SettingsError(f"exit_layer_{theirs} = {values}: expected one for each exit")
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
    if flag(arguments, "disable_bias_linear"):  # how it was called once
        has_bias = False
    found = (
        arguments.get("normalization", "LayerNorm"),
        flag(arguments, "swiglu"),
        has_bias,
    )
    if found == ("RMSNorm", True, False):
        return True
    if found == ("LayerNorm", False, True):
        refuse(arguments, add_qkv_bias=False)
        return False
    names = ("normalization", "swiglu", "add_bias_linear")
    shown = ", ".join(f"{name} = {value}" for name, value in zip(names, found, strict=True))
    raise SettingsError(
        f"{shown} can not be converted; only RMSNorm, True, False (llama) and LayerNorm, False, "
        "True (gpt) can"
    )


def _gelu(arguments: Settings) -> str:
    """Return which GELU it is: the fused kernel of bias and GELU approximates by tanh."""
    if flag(arguments, "openai_gelu"):
        return "tanh"
    if flag(arguments, "onnx_safe"):
        return "erf"
    return "tanh" if flag(arguments, "bias_gelu_fusion", True) else "erf"


def _groups(arguments: Settings, heads: int) -> int:
    # Without the flag the number is a default that nothing reads.
    if not flag(arguments, "group_query_attention"):
        return heads
    (groups,) = need(arguments, "num_query_groups")
    size = arguments.get("tensor_model_parallel_size") or 1
    if groups % size:
        raise SettingsError(
            f"num_query_groups = {groups} over tensor_model_parallel_size = {size} can not be "
            "converted: ranks share keys and values"
        )
    return groups


def _position(arguments: Settings) -> dict[str, Any]:
    kind = arguments.get("position_embedding_type", "learned_absolute")
    if flag(arguments, "use_rotary_position_embeddings"):
        kind = "rope"
    if kind == "learned_absolute":
        refuse(arguments, add_position_embedding=True)
        return {"position": "learned"}
    if kind != "rope":
        raise SettingsError(
            f"position_embedding_type = {kind!r} can not be converted; only learned_absolute and "
            "rope can"
        )
    base = to_number("rotary_base", arguments.get("rotary_base", 10000))
    options: dict[str, Any] = {"position": "rope", "rope_theta": base}
    factor = arguments.get("rotary_seq_len_interpolation_factor")
    if flag(arguments, "use_rope_scaling"):
        if factor is not None:
            raise SettingsError(
                f"rotary_seq_len_interpolation_factor = {factor} and use_rope_scaling are two ways "
                "to scale rotary positions; only one can be converted"
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
    """Return how many tokens there are, and remarks: embeddings are padded for even shards."""
    if arguments.get("vocab_size") is None:
        return padded, []
    (size,) = need(arguments, "vocab_size")
    if str(arguments.get("tokenizer_type")).startswith("Null"):
        size += 1  # it adds an end of document
    if size > padded:
        raise SettingsError(f"vocab_size = {size} is above padded_vocab_size = {padded}")
    if size == padded:
        return size, []
    return size, [
        f"model.vocab_size = {size}: rows {size} to {padded - 1} of embedding and output, which no "
        "token has, are left out; probabilities rise by what these had"
    ]
