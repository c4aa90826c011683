"""The model types of transformers that ee-llm supports: their settings in both directions.

`Family.read` returns the options of `model` and notes; `Family.write` returns config.json's keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ee_llm.config import ModelConfig
from ee_llm.conversion.huggingface.tables import GPT2, LLAMA, Table
from ee_llm.conversion.values import (
    LARGEST,
    Settings,
    SettingsError,
    count,
    flag,
    read_counts,
    to_number,
)

_WINDOW = 4096  # transformers' default


class Defaults(NamedTuple):
    """The values that transformers assumes for keys that config.json does not have."""

    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int = 0


class Family(NamedTuple):
    """A model type of transformers: its tensors, and its settings in both directions."""

    table: Table
    architecture: str
    read: Callable[[Settings], tuple[dict[str, Any], list[str]]]
    write: Callable[[ModelConfig], dict[str, Any]]
    fits: Callable[[ModelConfig], bool]
    neutral: dict[str, tuple[Any, ...]]
    """Keys that change the function of only this type, as in `keys.NEUTRAL`."""


ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""The scalings of rotary positions, and the keys that each of them requires."""


def rope_type(table: Settings) -> Any:
    """Return the type of scaling in a table of rotary positions."""
    return table.get("rope_type", table.get("type", "default"))


def _read_rope(settings: Settings, length: int) -> dict[str, Any]:
    """Return the options of rotary positions, in one table (newer versions) or in two keys."""
    tables = {name: settings.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"{name} is {table!r}: expected an object")
    given, older = tables["rope_parameters"], tables["rope_scaling"]
    if given and older and _rope_facts(given, settings) != _rope_facts(older, settings):
        raise SettingsError(
            f"rope_parameters = {given!r} and rope_scaling = {older!r} differ. Remove the one with "
            "which the model was not trained."
        )
    given = given or older
    theta = given.get("rope_theta", settings.get("rope_theta", 10000.0))
    kind = rope_type(given)
    options: dict[str, Any] = {"rope_theta": to_number("rope_theta", theta)}
    if kind == "default":
        return options
    values = {"original_max_position_embeddings": length, **given}
    if (
        settings.get("original_max_position_embeddings") is not None
    ):  # it has priority in transformers, too
        name = "original_max_position_embeddings"
        values[name] = settings[name]
    for name in sorted(ROPE_KEYS[kind]):
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
    defaults: Defaults,
    *,
    window: int | None = None,
    has_qkv_bias: bool = False,
    has_qk_norm: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a model of the table LLAMA, and notes.

    `window` is the number of tokens to which the narrowest layer attends, or None for all tokens.
    """
    layers, hidden, heads, ffn, vocabulary = read_counts(
        settings,
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    length, notes = _context(settings, "max_position_embeddings", defaults)
    rope = _read_rope(settings, length)
    if window is not None and window < length:
        notes.append(
            f"model.max_seq_length = {window}: beyond sliding_window = {window} tokens the model "
            f"would compute another function (max_position_embeddings = {length})."
        )
        length = window
    kv_heads = heads
    if "num_key_value_heads" not in settings:
        kv_heads = defaults.num_kv_heads or heads
    options = {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": count(settings, "num_key_value_heads", kv_heads),
        "ffn_hidden_size": ffn,
        "vocab_size": vocabulary,
        "max_seq_length": length,
        "norm_eps": to_number("rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": flag(settings, "tie_word_embeddings", False),
        "init_std": to_number("initializer_range", settings.get("initializer_range", 0.02)),
        "qkv_bias": has_qkv_bias,
        "qk_norm": has_qk_norm,
        **rope,
    }
    head_dim = count(settings, "head_dim", defaults.head_dim)
    if head_dim:
        options["head_dim"] = head_dim
    if heads * (head_dim or 1) > LARGEST:
        raise SettingsError(
            f"head_dim = {head_dim} with num_attention_heads = {heads} is too large"
        )
    return options, notes


def _context(settings: Settings, name: str, defaults: Defaults) -> tuple[int, list[str]]:
    """Return the context length in tokens, with a note if it is transformers' default."""
    if settings.get(name) is not None:
        return read_counts(settings, name)[0], []
    length = defaults.max_position_embeddings
    return length, [
        f"model.max_seq_length = {length}: config.json has no {name}, so this is the default of "
        "transformers."
    ]


def _layer_types(settings: Settings) -> list[str]:
    types = settings.get("layer_types") or []
    if not isinstance(types, list):
        raise SettingsError(f"layer_types is {types!r}: expected a list with a type for each layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise SettingsError(
                f"layer_types has {kind!r}, which is not supported. Supported: full_attention and "
                "sliding_attention."
            )
    return types


def _window(settings: Settings, default: int | None) -> int | None:
    value = settings.get("sliding_window", default)
    return None if value is None else read_counts({"sliding_window": value}, "sliding_window")[0]


def _read_plain(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    # transformers' llama attends to all tokens; other software uses windows with layer_types.
    is_sliding = "sliding_attention" in _layer_types(settings)
    window = _window(settings, None) if is_sliding else None
    return _read_llama(settings, _LLAMA_DEFAULTS, window=window)


def _read_mistral(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    # The window applies to all layers: only Qwen has use_sliding_window and layer_types.
    return _read_llama(settings, _MISTRAL_DEFAULTS, window=_window(settings, _WINDOW))


def _read_qwen(
    settings: Settings, defaults: Defaults, **differs: bool
) -> tuple[dict[str, Any], list[str]]:
    window = None
    if flag(settings, "use_sliding_window", False):
        window = _window(settings, _WINDOW)
    if types := _layer_types(settings):
        is_sliding = "sliding_attention" in types
    else:  # the first layers attend to all tokens
        (layers,) = read_counts(settings, "num_hidden_layers")
        is_sliding = to_number("max_window_layers", settings.get("max_window_layers", 28)) < layers
    return _read_llama(settings, defaults, window=window if is_sliding else None, **differs)


_LLAMA_DEFAULTS = Defaults(2048)
_MISTRAL_DEFAULTS = Defaults(131072, num_kv_heads=8)
_QWEN2_DEFAULTS = Defaults(32768, num_kv_heads=32)
_QWEN3_DEFAULTS = Defaults(32768, num_kv_heads=32, head_dim=128)
_GPT2_DEFAULTS = Defaults(1024)


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


# Other names of GPT-2's settings, which transformers accepts as well.
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_GELUS = {
    "gelu": "erf",
    "gelu_fast": "tanh",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}


def _read_gpt2(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    other = {name: settings[key] for key, name in _GPT2_NAMES.items() if key in settings}
    settings = {**other, **settings}
    for key, name in _GPT2_NAMES.items():
        if settings.get(key) is not None and settings[key] != settings[name]:
            raise SettingsError(
                f"{key} = {settings[key]!r} and {name} = {settings[name]!r} are the same setting. "
                "Remove the wrong one."
            )
    layers, hidden, heads, vocabulary = read_counts(
        settings, "n_layer", "n_embd", "n_head", "vocab_size"
    )
    length, notes = _context(settings, "n_positions", _GPT2_DEFAULTS)
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
        "gelu": _GELUS[settings.get("activation_function") or "gelu_new"],
    }, notes


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


_SILU = ("silu", "swish")
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        LLAMA,
        "LlamaForCausalLM",
        _read_plain,
        lambda model: {**_write_llama(model), "attention_bias": False, "mlp_bias": False},
        _is_rotary,
        {"hidden_act": _SILU, **_NO_BIAS},
    ),
    "mistral": Family(
        LLAMA,
        "MistralForCausalLM",
        _read_mistral,
        lambda model: {**_write_llama(model), "sliding_window": None},
        _is_rotary,
        {"hidden_act": _SILU},
    ),
    "qwen2": Family(
        LLAMA,
        "Qwen2ForCausalLM",
        lambda settings: _read_qwen(settings, _QWEN2_DEFAULTS, has_qkv_bias=True),
        lambda model: {**_write_llama(model), "use_sliding_window": False},
        lambda model: _is_rotary(model, qkv_bias=True),
        {"hidden_act": _SILU},
    ),
    "qwen3": Family(
        LLAMA,
        "Qwen3ForCausalLM",
        lambda settings: _read_qwen(settings, _QWEN3_DEFAULTS, has_qk_norm=True),
        lambda model: {
            **_write_llama(model),
            "use_sliding_window": False,
            "attention_bias": False,
        },
        lambda model: _is_rotary(model, qk_norm=True),
        {"hidden_act": _SILU, "attention_bias": (False,)},
    ),
    "gpt2": Family(
        GPT2,
        "GPT2LMHeadModel",
        _read_gpt2,
        _write_gpt2,
        _is_gpt2,
        {"activation_function": tuple(_GELUS)},
    ),
}
"""The families by transformers' `model_type`."""
