"""A model's options from the config.json of transformers, and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ee_llm.checkpoint.read import FUNCTION_OF_EXITS
from ee_llm.config import Config
from ee_llm.convert.families import FAMILIES, Family
from ee_llm.convert.values import Settings, SettingsError, refuse

ENTRY = "ee_llm"
"""The entry of config.json that describes exits; transformers carries it along unread."""

# What says nothing of the function that the model computes in evaluation.
_NEUTRAL = frozenset(
    """
    _name_or_path architectures attention_dropout attn_implementation attn_pdrop auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label is_decoder
    is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length
    max_window_layers min_length model_type n_ctx no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict return_dict_in_generate
    rope_theta sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj suppress_tokens task_specific_params temperature
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p unk_token_id unsloth_version use_cache
    """.split()  # noqa: SIM905
)

# What is read or checked by one family or another.
_READ = frozenset(
    """
    activation_function add_cross_attention attention_bias ee_llm head_dim hidden_act
    hidden_size initializer_range intermediate_size is_causal layer_norm_epsilon layer_types
    max_position_embeddings mlp_bias n_embd n_head n_inner n_layer n_positions
    num_attention_heads num_hidden_layers num_key_value_heads partial_rotary_factor rms_norm_eps
    rope_parameters rope_scaling scale_attn_by_inverse_layer_idx scale_attn_weights
    sliding_window tie_word_embeddings use_bfloat16 use_mrope use_sliding_window vocab_size
    """.split()  # noqa: SIM905
)

KNOWN = _NEUTRAL | _READ
"""The settings that are not refused for their name."""


def read_settings(
    settings: Settings, ignored: Sequence[str] = ()
) -> tuple[Family, dict[str, Any], list[str]]:
    """Return the family, the options of `model`, and remarks on what was changed.

    `ignored` names unknown settings to pass over. Raises SettingsError naming a setting that is
    missing, unknown or not to be converted.
    """
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SettingsError(
            f"model_type = {kind!r} can not be converted; only {', '.join(FAMILIES)} can"
        )
    refuse(settings, is_causal=True, use_mrope=False)
    for name, value in settings.items():
        # False and 0 say something; these say nothing.
        is_empty = value is None or value == {} or value == []
        if not is_empty and name not in KNOWN and name not in ignored:
            raise SettingsError(
                f"{name} = {value!r} is not known, and may make the model another function; if it "
                f"does not, convert with --ignore-settings {name}"
            )
    family = FAMILIES[kind]
    options, notes = family.read(settings)
    return family, options, notes


class Exits(NamedTuple):
    """What a folder says of exits: the options of `exits`, and whether they have no tensors."""

    options: dict[str, Any]
    are_copies: bool


def read_exits(settings: Settings) -> Exits | None:
    """Return the exits that the model was exported with; raises SettingsError."""
    entry = settings.get(ENTRY)
    if entry is None:
        return None
    options = entry.get("exits") if isinstance(entry, dict) else None
    if not isinstance(options, dict) or set(options) != set(FUNCTION_OF_EXITS):
        raise SettingsError(
            f"{ENTRY}.exits: expected {', '.join(FUNCTION_OF_EXITS)}, found {options!r}"
        )
    if not isinstance(are_copies := entry.get("copies"), bool):
        raise SettingsError(f"{ENTRY}.copies is {are_copies!r}: expected true or false")
    return Exits(options, are_copies)


def write_settings(
    config: Config, dtype: torch.dtype, preferred: str | None = None
) -> tuple[Family, dict[str, Any]]:
    """Return the family and the config.json of a model; `preferred` is tried first as its type.

    Raises SettingsError if no model of transformers is this one.
    """
    model = config.model
    kinds: Sequence[str] = [preferred, *FAMILIES] if preferred in FAMILIES else [*FAMILIES]
    kind = next((kind for kind in kinds if FAMILIES[kind].fits(model)), None)
    if kind is None:
        raise SettingsError(
            f"no model type among {', '.join(FAMILIES)} is a {model.family} with model.position = "
            f"{model.position}, model.qkv_bias = {str(model.qkv_bias).lower()}, model.qk_norm = "
            f"{str(model.qk_norm).lower()}, {model.num_heads} heads of {model.head_dim} and "
            f"{model.num_kv_heads} of keys in a width of {model.hidden_size}"
        )
    family = FAMILIES[kind]
    settings = {
        "architectures": [family.architecture],
        "model_type": kind,
        **family.write(model),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    return family, settings


def exits_entry(config: Config, are_copies: bool) -> dict[str, Any]:
    """Return what config.json says of exits, as `read_exits` reads it back."""
    exits = config.exits.model_dump()
    return {"exits": {name: exits[name] for name in FUNCTION_OF_EXITS}, "copies": are_copies}
