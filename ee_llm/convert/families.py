"""The models of transformers that are ours too: their settings, read and written.

`Family.read` gives the options of `model` and remarks; `Family.write` the settings of config.json.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ee_llm.config import ModelConfig
from ee_llm.convert.tables import GPT2, LLAMA, Table

Settings = Mapping[str, Any]


class SettingsError(ValueError):
    """A setting of config.json that is missing, or that no option of ours can say."""


class Family(NamedTuple):
    """A model type of transformers: its tensors, its settings in both directions."""

    table: Table
    architecture: str
    read: Callable[[Settings], tuple[dict[str, Any], list[str]]]
    write: Callable[[ModelConfig], dict[str, Any]]
    fits: Callable[[ModelConfig], bool]


def need(settings: Settings, *names: str) -> list[int]:
    """Return the counts of these names; raises SettingsError."""
    found = []
    for name in names:
        value = settings.get(name)
        if type(value) is not int or value < 1:
            raise SettingsError(f"{name} is {value!r}: expected a count")
        found.append(value)
    return found


def refuse(settings: Settings, **allowed: Any) -> None:
    """Raise SettingsError for settings that are neither absent nor as `allowed` says."""
    for name, only in allowed.items():
        if (value := settings.get(name)) is not None and value != only:
            raise SettingsError(f"{name} = {value!r} can not be converted; only {only!r} can")


_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _read_rope(settings: Settings) -> dict[str, Any]:
    """Return the options of rotary positions: one table in newer versions, two settings before."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise SettingsError(f"rope_scaling is {given!r}: expected an object")
    theta = given.get("rope_theta", settings.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_KEYS:
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


def to_number(name: str, value: Any) -> float:
    """Return a setting's value as a number; raises SettingsError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingsError(f"{name} is {value!r}: expected a number")
    return float(value)


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
    if settings.get("use_sliding_window") is False:
        window = None
    if window is not None:
        (window,) = need({"sliding_window": window}, "sliding_window")
    for kind in settings.get("layer_types") or ():
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
        "num_kv_heads": settings.get("num_key_value_heads") or heads,
        "ffn_hidden_size": ffn,
        "vocab_size": vocabulary,
        "max_seq_length": length,
        "norm_eps": to_number("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": settings.get("tie_word_embeddings") or False,
        "init_std": to_number("initializer_range", settings.get("initializer_range", 0.02)),
        "qkv_bias": has_qkv_bias,
        "qk_norm": has_qk_norm,
        **_read_rope(settings),
    }
    if head_dim := settings.get("head_dim") or default_head_dim:
        options["head_dim"] = head_dim
    return options, notes


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
    gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}.get(activation)
    if gelu is None:
        raise SettingsError(
            f"activation_function = {activation!r} can not be converted; only gelu_new and gelu can"
        )
    layers, hidden, heads, vocabulary, length = need(
        settings, "n_layer", "n_embd", "n_head", "vocab_size", "n_positions"
    )
    tied = settings.get("tie_word_embeddings")
    return {
        "family": "gpt",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "ffn_hidden_size": settings.get("n_inner") or 4 * hidden,
        "vocab_size": vocabulary,
        "max_seq_length": length,
        "norm_eps": to_number("layer_norm_epsilon", settings.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": True if tied is None else tied,
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
        lambda settings: _read_llama(settings, default_window=4096),
        lambda model: {**_write_llama(model), "sliding_window": None},
        _is_rotary,
    ),
    "qwen2": Family(
        LLAMA,
        "Qwen2ForCausalLM",
        lambda settings: _read_llama({"use_sliding_window": False, **settings}, has_qkv_bias=True),
        lambda model: {**_write_llama(model), "use_sliding_window": False},
        lambda model: _is_rotary(model, qkv_bias=True),
    ),
    "qwen3": Family(
        LLAMA,
        "Qwen3ForCausalLM",
        lambda settings: _read_llama(
            {"use_sliding_window": False, **settings}, has_qk_norm=True, default_head_dim=128
        ),
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
