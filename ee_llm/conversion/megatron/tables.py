"""The names that Megatron-LM and EE-LLM give the tensors of a model.

Layers are counted from 0 over the whole model here; files count from 0 on their stage. Tensor ranks
split the parameters as `architecture.tensor_parallel` states.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ee_llm.architecture.tensor_parallel import TensorSplit, tensor_split
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.config import Config
from ee_llm.conversion.huggingface.tables import SAME, Row, Table


class Module(NamedTuple):
    """The name of a module in a checkpoint, in Megatron-LM's older model and in megatron-core."""

    name: str
    legacy: str
    core: str


_LAYER = (
    Module("input_layernorm", "input_norm", "input_layernorm"),
    Module(
        "self_attention.linear_qkv", "self_attention.query_key_value", "self_attention.linear_qkv"
    ),
    Module("self_attention.q_layernorm", "self_attention.q_norm", "self_attention.q_layernorm"),
    Module("self_attention.k_layernorm", "self_attention.k_norm", "self_attention.k_layernorm"),
    Module("self_attention.linear_proj", "self_attention.dense", "self_attention.linear_proj"),
    Module("pre_mlp_layernorm", "post_attention_norm", "pre_mlp_layernorm"),
    Module("mlp.linear_fc1", "mlp.dense_h_to_4h", "mlp.linear_fc1"),
    Module("mlp.linear_fc2", "mlp.dense_4h_to_h", "mlp.linear_fc2"),
)
# The parts of an exit in EE-LLM, below the exit's layer.
_EXIT = (
    Module("norm", "exit_norm", "exit_norm"),
    Module("mlp_norm", "post_attention_norm", "pre_mlp_layernorm"),
    Module("mlp.linear_fc1", "mlp.branch.dense_h_to_4h", "mlp.branch.linear_fc1"),
    Module("mlp.linear_fc2", "mlp.branch.dense_4h_to_h", "mlp.branch.linear_fc2"),
    *(
        module._replace(
            name=f"block.{module.name}",
            legacy=f"exit_block.{module.legacy}",
            core=f"exit_block.{module.core}",
        )
        for module in _LAYER
    ),
)
_MODEL = (
    Module("embedding.word", *2 * ("embedding.word_embeddings",)),
    Module("embedding.position", *2 * ("embedding.position_embeddings",)),
    *(
        Module(
            f"layers.{{n}}.{m.name}",
            f"encoder.layers.{{i}}.{m.legacy}",
            f"decoder.layers.{{i}}.{m.core}",
        )
        for m in _LAYER
    ),
    *(
        Module(
            f"exits.{{b}}.{m.name}",
            f"encoder.layers.{{e}}.{m.legacy}",
            f"decoder.layers.{{e}}.{m.core}",
        )
        for m in _EXIT
    ),
    Module("exits.{b}.output", *2 * ("exit_output_layer.{k}",)),
    Module("exits.{last}.norm", "encoder.final_norm", "decoder.final_layernorm"),
    Module("output", *2 * ("output_layer",)),
)
WORDS, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
TABLE = Table((), WORDS, OUTPUT)
HEAD = "word_embeddings_for_head.weight"
"""A stage's copy of the word embedding, for an output weight that is tied to it."""

# Older names, and Transformer Engine's names, of the modules above: (pattern, replacement).
_LEGACY_NAMES = (
    (r"^language_model\.", ""),
    (r"^transformer\.", "encoder."),
    (r"layernorm", "norm"),
    (r"\.attention\.", ".self_attention."),
    (r"\.mlp\.trunk\.", ".mlp."),
)
_CORE_NAMES = (
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
)
_NEUTRAL = re.compile(r"_extra_state|(^|\.)rotary_pos_emb\.inv_freq$")


def is_neutral(key: str) -> bool:
    """Return whether a key has no weights, such as FP8 scales and rotary frequencies."""
    return _NEUTRAL.search(key) is not None


def is_core(keys: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of megatron-core and not of the older model."""
    return not any(key.startswith("language_model.") for key in keys)


def current_name(key: str, core: bool) -> str:
    """Return the current name of a key, as in the tables."""
    for pattern, name in _CORE_NAMES if core else _LEGACY_NAMES:
        key = re.sub(pattern, name, key)
    return key


class Layout(NamedTuple):
    """The rows by our names, and how tensor ranks split the tensors by their keys."""

    rows: dict[str, Row]
    splits: dict[str, TensorSplit | None]


def build_layout(config: Config, exit_layers: list[int], core: bool) -> Layout:
    """Return where each tensor of the model is stored.

    `exit_layers` are the layers with exits, from 1, in the order of their output weights.
    """
    rows: dict[str, Row] = {}
    # The output weight may be present although it is tied.
    splits = {OUTPUT: tensor_split("output.weight", config.model)}
    shift = config.exits.placement == "pre"
    for name in tensor_shapes(config):
        kind, fill = _kind(name, config)
        if kind.startswith("exits.{b}."):
            layer = fill["b"] + shift
            fill |= {"e": layer - 1, "k": exit_layers.index(layer) if layer in exit_layers else 0}
        stem, _, last = kind.rpartition(".")
        module = next(module for module in _MODEL if module.name == stem)
        key = f"{module.core if core else module.legacy}.{last}".format(**fill)
        rows[name] = Row(name, (key,), SAME)
        splits[key] = tensor_split(name, config.model)
    return Layout(rows, splits)


def _kind(name: str, config: Config) -> tuple[str, dict[str, int]]:
    """Return a parameter's name with a placeholder for its number, and the values to fill in."""
    match = re.match(r"(layers|exits)\.(\d+)\.(.*)", name)
    if match is None:
        return name, {}
    section, number, rest = match[1], int(match[2]), match[3]
    if section == "layers":
        return f"layers.{{n}}.{rest}", {"n": number, "i": number - 1}
    if number == config.model.num_layers:
        return f"exits.{{last}}.{rest}", {"last": number}
    return f"exits.{{b}}.{rest}", {"b": number}
