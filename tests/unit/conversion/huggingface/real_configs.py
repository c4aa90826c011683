"""config.json files of models on the Hugging Face Hub, as their authors published them.

`shrunk` makes the sizes tiny and changes nothing else.
"""

from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA_3 = _LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": 128256,
}
_SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA_31 = _LLAMA_3 | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": _SCALED,
    "transformers_version": "4.42.3",
}
_LLAMA_32 = _LLAMA_31 | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": _SCALED | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
_SMOLLM = _LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "vocab_size": 49152,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
_GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
_GPT2_LARGE = _GPT2 | {"n_special": 0, "predict_special_tokens": True}


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


REAL: dict[str, dict[str, Any]] = {
    "decapoda-research/llama-7b-hf": _without(
        _LLAMA
        | {
            "architectures": ["LLaMAForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "max_sequence_length": 2048,
            "pad_token_id": -1,
            "rms_norm_eps": 1e-06,
            "transformers_version": "4.27.0.dev0",
        },
        *("max_position_embeddings", "num_key_value_heads", "pretraining_tp", "rope_scaling"),
        "tie_word_embeddings",
    ),
    "huggyllama/llama-7b": _without(
        _LLAMA
        | {
            "max_position_embeddings": 2048,
            "max_sequence_length": 2048,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
        },
        *("num_key_value_heads", "pretraining_tp", "rope_scaling"),
    ),
    "meta-llama/Llama-2-7b-hf": _LLAMA | {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
    "meta-llama/Llama-2-70b-hf": _LLAMA | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "NousResearch/Llama-2-7b-chat-hf": _LLAMA
    | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "pad_token_id": 0},
    "NousResearch/Nous-Hermes-llama-2-7b": _LLAMA
    | {"_name_or_path": "./hermes", "pad_token_id": 0, "use_cache": False, "vocab_size": 32001},
    "lmsys/vicuna-7b-v1.3": _without(
        _LLAMA
        | {
            "_name_or_path": "vicuna-7b-v1.3",
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
        },
        *("num_key_value_heads", "pretraining_tp", "rope_scaling"),
    ),
    "lmsys/vicuna-7b-v1.5-16k": _LLAMA
    | {"pad_token_id": 0, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "codellama/CodeLlama-7b-hf": _LLAMA
    | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016},
    "01-ai/Yi-6B": _LLAMA
    | {
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "rope_theta": 5000000.0,
        "vocab_size": 64000,
    },
    "01-ai/Yi-1.5-9B-Chat": _LLAMA
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_key_value_heads": 4,
        "num_hidden_layers": 48,
        "rope_theta": 5000000.0,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _LLAMA
    | {
        "attention_bias": False,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rope_theta": 10000.0,
    },
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3,
    "NousResearch/Meta-Llama-3-8B": _LLAMA_3 | {"_name_or_path": "meta-llama/Meta-Llama-3-8B"},
    "NousResearch/Hermes-2-Pro-Llama-3-8B": _LLAMA_3
    | {"_name_or_path": "NousResearch/Meta-Llama-3-8B", "eos_token_id": 128003, "use_cache": False},
    "unsloth/llama-3-8b-Instruct": _LLAMA_3
    | {"_name_or_path": "unsloth/llama-3-8b-Instruct", "pad_token_id": 128255},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31,
    "unsloth/Meta-Llama-3.1-8B-Instruct": _LLAMA_31
    | {"_name_or_path": "meta-llama/Meta-Llama-3.1-8B-Instruct", "unsloth_version": "2024.9"},
    "NousResearch/Hermes-3-Llama-3.1-8B": _LLAMA_31 | {"eos_token_id": 128040, "mlp_bias": False},
    "meta-llama/Llama-3.2-1B-Instruct": _LLAMA_32,
    "unsloth/Llama-3.2-1B-Instruct": _LLAMA_32
    | {
        "_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
        "pad_token_id": 128004,
        "unsloth_fixed": True,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_31 | {"transformers_version": "4.43.0"},
    "deepseek-ai/deepseek-llm-7b-chat": _without(
        _LLAMA
        | {
            "attention_bias": False,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "rms_norm_eps": 1e-06,
            "vocab_size": 102400,
        },
        "rope_theta",
    ),
    "facebook/layerskip-llama2-7B": _LLAMA
    | {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
    "facebook/layerskip-llama3-8B": _LLAMA_3 | {"mlp_bias": False},
    "facebook/layerskip-llama3.2-1B": _LLAMA_32,
    "HuggingFaceTB/SmolLM-135M": _without(
        _SMOLLM | {"max_position_embeddings": 2048, "rope_theta": 10000.0},
        *("is_llama_config", "rope_interleaved"),
    ),
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "transformers.js_config": {
            "dtype": "q4",
            "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"},
        },
    },
    "saved by transformers 5": _without(
        _SMOLLM
        | {
            "_model_name_or_path": "Smollm2 135M 8k Lc100K Mix1 Ep2",
            "dtype": "bfloat16",
            "head_dim": 64,
            "mlp_bias": False,
            "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
            "unk_token_id": 0,
        },
        *("is_llama_config", "rope_interleaved", "rope_scaling", "rope_theta", "torch_dtype"),
    ),
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL
    | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None},
    "mistralai/Mistral-Nemo-Instruct-2407": _MISTRAL
    | {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "NousResearch/Hermes-2-Pro-Mistral-7B": _MISTRAL
    | {"_name_or_path": "mistralai/Mistral-7B-v0.1", "eos_token_id": 32000, "use_cache": False},
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL
    | {"_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2},
    "Qwen/Qwen1.5-0.5B-Chat": _QWEN2
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "transformers_version": "4.37.0"},
    "Qwen/Qwen2-0.5B": _QWEN2 | {"max_window_layers": 24, "sliding_window": 131072},
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2,
    "Qwen/Qwen2.5-7B": _QWEN2
    | {"max_window_layers": 28, "tie_word_embeddings": False, "use_mrope": False},
    "Qwen2.5 saved again, all layers full": _QWEN2
    | {
        "layer_types": ["full_attention"] * 24,
        "sliding_window": 16,
        "use_sliding_window": True,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2
    | {"eos_token_id": 151643, "tie_word_embeddings": False, "use_mrope": False},
    "unsloth/Qwen2.5-0.5B-Instruct": _QWEN2
    | {
        "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "pad_token_id": 151654,
        "rope_scaling": None,
        "sliding_window": None,
        "unsloth_fixed": True,
    },
    "Qwen/Qwen3-0.6B": _QWEN3,
    "unsloth/Qwen3-0.6B": _QWEN3 | {"pad_token_id": 151669, "unsloth_fixed": True},
    "openai-community/gpt2": _GPT2,
    "openai-community/gpt2-medium": _GPT2_LARGE | {"n_embd": 1024, "n_head": 16, "n_layer": 24},
    "openai-community/gpt2-large": _GPT2_LARGE | {"n_embd": 1280, "n_head": 20, "n_layer": 36},
    "openai-community/gpt2-xl": _GPT2
    | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
    "distilbert/distilgpt2": _GPT2_LARGE
    | {
        "_num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "n_layer": 6,
    },
    "ai-forever/rugpt3medium": _GPT2_LARGE
    | {
        "n_inner": None,
        "output_past": True,
        "pad_token_id": 0,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "use_cache": True,
    },
    "ResembleAI/chatterbox-turbo, with two names of the width": _GPT2_LARGE | {"hidden_size": 768},
}
"""The configurations by the name of the model on the Hub."""

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2.5 with YaRN": (
        _QWEN2
        | {
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            }
        },
        r"rope_scaling of type 'yarn' \(YaRN\)",
    ),
    "Yarn-Llama-2-7b-64k": (
        _LLAMA
        | {
            "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
            "rope_scaling": {"factor": 16.0, "finetuned": True, "type": "yarn"},
        },
        r"rope_scaling of type 'yarn' \(YaRN\)",
    ),
    "a llama with dynamic NTK": (
        _LLAMA | {"rope_scaling": {"factor": 2.0, "type": "dynamic"}},
        r"rope_scaling of type 'dynamic' \(dynamic NTK scaling\)",
    ),
    "a llama with LongRoPE": (
        _LLAMA
        | {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        r"rope_scaling of type 'longrope' \(LongRoPE\)",
    ),
    "Qwen2.5-7B-Instruct-1M": (
        _QWEN2 | {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        r"dual_chunk_attention_config = ",
    ),
    "TheBloke/Llama-2-7B-AWQ": (
        _LLAMA | {"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "awq"}},
        r"weights quantized with 'awq' \(quantization_config\)",
    ),
    "TheBloke/Llama-2-7B-GPTQ": (
        _LLAMA | {"quantization_config": {"bits": 4, "quant_method": "gptq"}},
        r"weights quantized with 'gptq'",
    ),
    "unsloth/llama-3-8b-bnb-4bit": (
        _LLAMA_3 | {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        r"weights quantized with 'bitsandbytes'",
    ),
    "Llama 3.1 in FP8": (
        _LLAMA_31 | {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        r"weights quantized with 'fbgemm_fp8'",
    ),
    "a GPT-2 of Stanford's Mistral": (
        _GPT2 | {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        r"gpt2: scale_attn_by_inverse_layer_idx = True\. ",
    ),
    "a GPT-2 with ReLU": (_GPT2 | {"activation_function": "relu"}, "activation_function = 'relu'"),
    "a llama with biases": (_LLAMA | {"attention_bias": True}, r"attention_bias = True"),
    "two scalars of Granite's": (
        _LLAMA | {"embedding_multiplier": 12.0, "logits_scaling": 16.0},
        r"embedding_multiplier = 12.0; logits_scaling = 16.0",
    ),
    **{
        name: (_LLAMA | {"model_type": kind}, rf"model_type = '{kind}' is not supported, .*{why}")
        for name, kind, why in (
            ("microsoft/phi-2", "phi", "attention and MLP in parallel"),
            ("microsoft/Phi-3-mini-4k-instruct", "phi3", "fused projections"),
            ("google/gemma-2b", "gemma", r"norms with 1 \+ weight"),
            ("google/gemma-2-2b", "gemma2", "soft-capped logits"),
            ("google/gemma-3-1b-it", "gemma3_text", "alternating windows"),
            ("allenai/OLMo-1B-hf", "olmo", "norms without weights"),
            ("allenai/OLMo-2-1124-7B", "olmo2", "norms after attention"),
            ("mistralai/Mixtral-8x7B-v0.1", "mixtral", "mixture of experts"),
            ("tiiuae/falcon-7b", "falcon", "in parallel"),
            ("mosaicml/mpt-7b", "mpt", "ALiBi"),
            ("bigscience/bloom-560m", "bloom", "ALiBi"),
            ("EleutherAI/pythia-70m", "gpt_neox", "rotations of a part"),
            ("EleutherAI/gpt-neo-125m", "gpt_neo", "local attention"),
            ("EleutherAI/gpt-j-6b", "gptj", "in parallel"),
            ("facebook/opt-125m", "opt", "ReLU"),
            ("stabilityai/stablelm-2-1_6b", "stablelm", "LayerNorm"),
            ("bigcode/starcoder2-3b", "starcoder2", "LayerNorm"),
            ("CohereForAI/c4ai-command-r-v01", "cohere", "scaled logits"),
            ("Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe", "mixture of experts"),
            ("Qwen/Qwen3-30B-A3B", "qwen3_moe", "mixture of experts"),
            ("deepseek-ai/DeepSeek-V3", "deepseek_v3", "latent attention"),
            ("ibm-granite/granite-3.0-2b-base", "granite", "scaled embeddings"),
            ("HuggingFaceTB/SmolLM3-3B", "smollm3", "without rotary positions"),
            ("internlm/internlm2-7b", "internlm2", "fused projections"),
            ("state-spaces/mamba-130m-hf", "mamba", "state-space"),
            ("openai/gpt-oss-20b", "gpt_oss", "sinks"),
        )
    },
}
"""Models that compute another function: their config.json, and the expected error."""

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "vocab_size": 300,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with tiny sizes: grouped keys stay grouped, absent ones absent."""
    small = {name: _SIZES.get(name, value) for name, value in config.items()}
    if config.get("num_key_value_heads", 1) < config.get("num_attention_heads", 1):
        small["num_key_value_heads"] = 2
    if small.get("pad_token_id") is not None:  # transformers wants a row of the embedding
        small["pad_token_id"] = min(small["pad_token_id"], _SIZES["vocab_size"] - 1)
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][:3]
    return small
