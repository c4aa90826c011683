"""The keys of config.json: keys without effect, and keys that change a model's function.

A key in neither list is unknown. It is reported, and is harmless if all tensors of the model are
known and `ee-llm convert --check` finds equal logits.
"""

from typing import Any

from ee_llm.conversion.values import Settings

# Keys that do not affect logits at inference: names, versions, training and generation.
_INERT = frozenset(
    """
    architectures attention_dropout attn_implementation attn_pdrop bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size end_token_id eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    id2label is_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty
    max_length max_sequence_length min_length model_max_length model_type n_ctx n_special
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id
    predict_special_tokens prefix pretraining_tp problem_type remove_invalid_values
    reorder_and_upcast_attn repetition_penalty resid_pdrop residual_dropout return_dict
    return_dict_in_generate sep_token_id seq_length summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class tokenizer_model_max_length
    tokenizer_padding_side top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id use_bfloat16 use_cache use_return_dict
    """.split()  # noqa: SIM905
)
_INERT_PREFIXES = ("_", "unsloth_")

# Keys that the readers of families.py use.
_READ = frozenset(
    """
    activation_function attention_bias ee_llm head_dim hidden_act hidden_size initializer_range
    intermediate_size layer_norm_epsilon layer_types max_position_embeddings max_window_layers
    mlp_bias n_embd n_head n_inner n_layer n_positions num_attention_heads num_hidden_layers
    num_key_value_heads original_max_position_embeddings rms_norm_eps rope_parameters rope_scaling
    rope_theta sliding_window tie_word_embeddings use_sliding_window vocab_size
    """.split()  # noqa: SIM905
)

# Keys within a table of rotary positions. A key of one scaling has no effect in another.
_OF_ROPE = frozenset(
    """
    attention_factor beta_fast beta_slow factor finetuned high_freq_factor low_freq_factor mscale
    mscale_all_dim original_max_position_embeddings rope_theta rope_type type
    """.split()  # noqa: SIM905
)

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_out_bias": (False,),
    "attention_sink": (False, 0),
    "attn_logit_softcapping": (),
    "bias": (False,),
    "clip_qkv": (),
    "compression_config": (),
    "cross_attention_layers": ([],),
    "cross_layer_sharing": (False,),
    "dim_model_base": (),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (0,),
    "layer_norm_type": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "moe_intermediate_size": (0,),
    "moe_num_experts": (0,),
    "multi_query": (False,),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "norm_before_gate": (),
    "norm_type": ("rmsnorm", "rms_norm"),
    "norm_topk_prob": (False,),
    "num_experts": (0,),
    "num_experts_per_tok": (0,),
    "num_kv_shared_layers": (0,),
    "num_local_experts": (0, 1),
    "num_nextn_predict_layers": (0,),
    "original_rope": (True,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("absolute", "rope", "rotary"),
    "pruned_heads": ({},),
    "q_lora_rank": (0,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rope_pct": (1,),
    "rope_ratio": (1,),
    "rotary_dim": (),
    "rotary_pct": (1,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "scale_depth": (1,),
    "scale_emb": (1,),
    "scale_embedding": (False,),
    "softmax_scale": (),
    "use_alibi": (False,),
    "use_attention_sinks": (False,),
    "use_bias": (False,),
    "use_dual_chunk_attention": (False,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_rope": (True,),
}
"""Keys that change the function of any model, and their values besides null that do not."""

ROPE_TYPES = {
    "dynamic": "dynamic NTK scaling",
    "longrope": "LongRoPE",
    "mrope": "multimodal rotary positions",
    "ntk": "NTK scaling",
    "proportional": "rotations of a part of each head",
    "su": "LongRoPE",
    "yarn": "YaRN",
}
"""Scalings of rotary positions that ee-llm does not compute."""

ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama_4_scaling_beta": (0,),
    "long_factor": (),
    "mrope_interleaved": (False,),
    "mrope_section": (),
    "partial_rotary_factor": (1,),
    "short_factor": (),
}
"""The same as `NEUTRAL`, for keys within `rope_scaling` or `rope_parameters`."""

_EXPERTS = "a mixture of experts"
OTHER_MODELS = {
    "arcee": "MLPs with squared ReLU",
    "baichuan": "fused projections and ALiBi in its larger sizes",
    "bloom": "ALiBi positions",
    "chatglm": "rotations of a part of each head",
    "codegen": "attention and MLP in parallel",
    "cohere": "attention and MLP in parallel, and scaled logits",
    "cohere2": "attention and MLP in parallel, and layers without positions",
    "dbrx": _EXPERTS,
    "deepseek_v2": "multi-head latent attention and " + _EXPERTS,
    "deepseek_v3": "multi-head latent attention and " + _EXPERTS,
    "exaone4": "norms after attention and MLP",
    "falcon": "attention and MLP in parallel",
    "gemma": "norms with 1 + weight, scaled embeddings and a GELU gate",
    "gemma2": "norms with 1 + weight, soft-capped logits and alternating windows",
    "gemma3": "norms with 1 + weight and alternating windows",
    "gemma3_text": "norms with 1 + weight and alternating windows",
    "glm": "rotations of a part of each head",
    "glm4": "rotations of a part of each head, and norms after attention and MLP",
    "gpt_bigcode": "multi-query attention with GPT-2's layers",
    "gpt_neo": "alternating local attention",
    "gpt_neox": "rotations of a part of each head, and attention and MLP in parallel",
    "gpt_oss": _EXPERTS + " and attention sinks",
    "gptj": "attention and MLP in parallel",
    "granite": "scaled embeddings, residuals, attention and logits",
    "granitemoe": _EXPERTS,
    "internlm2": "fused projections (convert it to a llama first)",
    "jamba": "state-space layers",
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
    "minicpm": "scaled embeddings, residuals and logits",
    "mixtral": _EXPERTS,
    "mllama": "images, by cross-attention",
    "mpt": "ALiBi positions",
    "nemotron": "squared ReLU and norms with 1 + weight",
    "olmo": "norms without weights",
    "olmo2": "norms after attention and MLP",
    "olmo3": "norms after attention and MLP",
    "olmoe": _EXPERTS,
    "opt": "positions with an offset, and ReLU",
    "persimmon": "norms of queries and keys, and squared ReLU",
    "phi": "attention and MLP in parallel, and rotations of a part of each head",
    "phi3": "fused projections, and LongRoPE in its long-context versions",
    "phimoe": _EXPERTS,
    "qwen": "fused projections (it is the first Qwen, before Qwen 1.5)",
    "qwen2_moe": _EXPERTS,
    "qwen2_vl": "images, and multimodal rotary positions",
    "qwen2_5_vl": "images, and multimodal rotary positions",
    "qwen3_moe": _EXPERTS,
    "qwen3_next": "linear attention and " + _EXPERTS,
    "recurrent_gemma": "recurrent layers",
    "smollm3": "layers without rotary positions",
    "stablelm": "rotations of a part of each head, and LayerNorm",
    "starcoder2": "biases, LayerNorm and GELU with rotary positions",
    "xglm": "sinusoidal positions",
}
"""Model types that ee-llm does not compute, and their differences."""


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Return whether a value of a function-changing key does not change the function."""
    return value is None or value in neutral


def unknown_keys(settings: Settings) -> dict[str, Any]:
    """Return the settings in none of the lists, without empty values (null, {} or [])."""
    known = _INERT | _READ | NEUTRAL.keys() | {"quantization_config"}
    found = {name: value for name, value in settings.items() if name not in known}
    for table in ("rope_parameters", "rope_scaling"):
        rope = settings.get(table) or {}
        names = rope.keys() - ROPE_NEUTRAL.keys() - _OF_ROPE
        found |= {f"{table}.{name}": rope[name] for name in sorted(names)}
    return {
        name: value
        for name, value in found.items()
        if not name.startswith(_INERT_PREFIXES) and value is not None and value not in ({}, [])
    }
