"""The models of transformers that are ours too: their settings, read and written.

`Family.read` gives the options of `model` and remarks; `Family.write` the settings of config.json.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ee_llm.config import ModelConfig
from ee_llm.convert.tables import GPT2, LLAMA, Table
from ee_llm.convert.values import (
    LARGEST,
    Settings,
    SettingsError,
    count,
    flag,
    need,
    refuse,
    to_number,
)

_WINDOW = 4096  # transformers' default


class Family(NamedTuple):
    """A model type of transformers: its tensors, its settings in both directions."""

    table: Table
    architecture: str
    read: Callable[[Settings], tuple[dict[str, Any], list[str]]]
    write: Callable[[ModelConfig], dict[str, Any]]
    fits: Callable[[ModelConfig], bool]


_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _read_rope(settings: Settings) -> dict[str, Any]:
    """Return the options of rotary positions: one table in newer versions, two settings before."""
    tables = {name: settings.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"{name} is {table!r}: expected an object")
    given, older = tables["rope_parameters"], tables["rope_scaling"]
    if given and older and _rope_facts(given, settings) != _rope_facts(older, settings):
        raise SettingsError(
            f"rope_parameters = {given!r} and rope_scaling = {older!r} differ; remove the one that "
            "the model was not trained with"
        )
    given = given or older
    theta = given.get("rope_theta", settings.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise SettingsError(
            f"rope_scaling of the type {kind!r} can not be converted; only "
            f"{', '.join(_ROPE_KEYS)} can"
        )
    refuse(given, partial_rotary_factor=1.0)
    refuse(settings, partial_rotary_factor=1.0)
    known = _ROPE_KEYS[kind] | {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    for name in given.keys() - known:
        if given[name] is not None and name not in _ROPE_KEYS["llama3"]:
            raise SettingsError(f"rope_scaling.{name} = {given[name]!r} can not be converted")
    options: dict[str, Any] = {"rope_theta": to_number("rope_theta", theta)}
    if kind == "default":
        return options
    values = {"original_max_position_embeddings": settings.get("max_position_embeddings"), **given}
    for name in sorted(_ROPE_KEYS[kind]):
        values[name] = to_number(f"rope_scaling.{name}", values.get(name))
    options |= {"rope_scaling": kind, "rope_factor": values["factor"]}
    if kind == "llama3":
        options["rope_low_freq_factor"] = values["low_freq_factor"]
        options["rope_high_freq_factor"] = values["high_freq_factor"]
        options["rope_original_length"] = int(values["original_max_position_embeddings"])
    return options


def _rope_facts(table: Settings, settings: Settings) -> dict[str, Any]:
    facts = {"rope_theta": settings.get("rope_theta"), "rope_type": table.get("type"), **table}
    return {name: v for name, v in facts.items() if v is not None and name != "type"}


def _read_llama(
    settings: Settings,
    *,
    default_window: int | None = None,
    has_qkv_bias: bool = False,
    has_qk_norm: bool = False,
    default_head_dim: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a model of the table LLAMA, and remarks."""
    refuse(settings, hidden_act="silu", attention_bias=False, mlp_bias=False)
    layers, hidden, heads, ffn, vocabulary, length = need(
        settings,
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    )
    window = settings.get("sliding_window", default_window)
    if not flag(settings, "use_sliding_window", True):
        window = None
    if window is not None:
        (window,) = need({"sliding_window": window}, "sliding_window")
    types = settings.get("layer_types") or []
    if not isinstance(types, list):
        raise SettingsError(f"layer_types is {types!r}: expected a list, a type for each layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise SettingsError(f"layer_types has {kind!r}, which can not be converted")
    notes = []
    if window is not None and window < length:
        notes.append(
            f"model.max_seq_length = {window}: beyond sliding_window of {window} tokens the model "
            f"would be another function (max_position_embeddings = {length})"
        )
        length = window
    options = {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": count(settings, "num_key_value_heads", heads),
        "ffn_hidden_size": ffn,
        "vocab_size": vocabulary,
        "max_seq_length": length,
        "norm_eps": to_number("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": flag(settings, "tie_word_embeddings", False),
        "init_std": to_number("initializer_range", settings.get("initializer_range", 0.02)),
        "qkv_bias": has_qkv_bias,
        "qk_norm": has_qk_norm,
        **_read_rope(settings),
    }
    head_dim = count(settings, "head_dim", default_head_dim or 0)
    if head_dim:
        options["head_dim"] = head_dim
    if heads * (head_dim or 1) > LARGEST:
        raise SettingsError(f"head_dim = {head_dim} of num_attention_heads = {heads} is too much")
    return options, notes


def _read_mistral(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    # Its window counts always; use_sliding_window is Qwen's alone.
    given = {name: value for name, value in settings.items() if name != "use_sliding_window"}
    return _read_llama(given, default_window=_WINDOW)


def _read_qwen(settings: Settings, **differs: Any) -> tuple[dict[str, Any], list[str]]:
    given = {**settings, "use_sliding_window": flag(settings, "use_sliding_window", False)}
    return _read_llama(given, default_window=_WINDOW, **differs)


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if scaling is not None and model.rope_scaling == "llama3":
        scaling["low_freq_factor"] = model.rope_low_freq_factor
        scaling["high_freq_factor"] = model.rope_high_freq_factor
        scaling["original_max_position_embeddings"] = model.rope_original_length
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
    }


def _read_gpt2(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    refuse(
        settings,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str):
        raise SettingsError(f"activation_function is {activation!r}: expected a name")
    gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}.get(activation)
    if gelu is None:
        raise SettingsError(
            f"activation_function = {activation!r} can not be converted; only gelu_new and gelu can"
        )
    layers, hidden, heads, vocabulary, length = need(
        settings, "n_layer", "n_embd", "n_head", "vocab_size", "n_positions"
    )
    return {
        "family": "gpt",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "ffn_hidden_size": count(settings, "n_inner", 4 * hidden),
        "vocab_size": vocabulary,
        "max_seq_length": length,
        "norm_eps": to_number("layer_norm_epsilon", settings.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": flag(settings, "tie_word_embeddings", True),
        "init_std": to_number("initializer_range", settings.get("initializer_range", 0.02)),
        "gelu": gelu,
    }, []


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_positions": model.max_seq_length,
        "activation_function": "gelu_new" if model.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _is_rotary(model: ModelConfig, *, qkv_bias: bool = False, qk_norm: bool = False) -> bool:
    has = (model.family, model.position, model.qkv_bias, model.qk_norm)
    return has == ("llama", "rope", qkv_bias, qk_norm)


def _is_gpt2(model: ModelConfig) -> bool:
    is_plain = model.num_heads * model.head_dim == model.hidden_size
    return (
        model.family == "gpt"
        and model.position == "learned"
        and model.num_kv_heads == model.num_heads
        and is_plain
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(
        LLAMA,
        "LlamaForCausalLM",
        _read_llama,
        lambda model: {**_write_llama(model), "attention_bias": False, "mlp_bias": False},
        _is_rotary,
    ),
    "mistral": Family(
        LLAMA,
        "MistralForCausalLM",
        _read_mistral,
        lambda model: {**_write_llama(model), "sliding_window": None},
        _is_rotary,
    ),
    "qwen2": Family(
        LLAMA,
        "Qwen2ForCausalLM",
        lambda settings: _read_qwen(settings, has_qkv_bias=True),
        lambda model: {**_write_llama(model), "use_sliding_window": False},
        lambda model: _is_rotary(model, qkv_bias=True),
    ),
    "qwen3": Family(
        LLAMA,
        "Qwen3ForCausalLM",
        lambda settings: _read_qwen(settings, has_qk_norm=True, default_head_dim=128),
        lambda model: {
            **_write_llama(model),
            "use_sliding_window": False,
            "attention_bias": False,
        },
        lambda model: _is_rotary(model, qk_norm=True),
    ),
    "gpt2": Family(GPT2, "GPT2LMHeadModel", _read_gpt2, _write_gpt2, _is_gpt2),
}
"""By transformers' `model_type`."""
