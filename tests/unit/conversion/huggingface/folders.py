"""Random models of transformers in unusual shapes, saved with save_pretrained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 28,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 40,
}
NO_HEAD_DIM = {k: v for k, v in SIZES.items() if k != "head_dim"}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 18,
    "n_layer": 5,
    "n_head": 6,
    "n_inner": 26,
    "n_positions": 48,
}
# Name: model type, settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", SIZES | {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama 3": ("llama", SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama 3 tied": ("llama", SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama linear": (
        "llama",
        SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "llama one kv head": ("llama", SIZES | {"num_key_value_heads": 1, "head_dim": 6}),
    "mistral": ("mistral", NO_HEAD_DIM | {"sliding_window": None}),
    "qwen2": ("qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES),
    "gpt2": ("gpt2", GPT2),
    "gpt2 exact gelu, untied": (
        "gpt2",
        GPT2 | {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": None},
    ),
}


def make_model(kind: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """Return a model of transformers in which every parameter is random and matters."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model, seed)
    return model


def randomize(model: Any, seed: int = 0) -> None:
    """Set every parameter of a model to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.dim() == 1 else 0.3
            parameter.copy_(noise * scale + (is_norm and name.endswith("weight")))


def make_folder(
    path: Path,
    name: str = "llama 3",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    vocabulary: int = VOCABULARY,
    **settings: Any,
) -> Path:
    """Write a folder with a model, and a tokenizer of `vocabulary` tokens."""
    kind, given = MODELS[name]
    model = make_model(kind, given | settings).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path / "tokenizer.json", vocabulary)
    (path / "tokenizer_config.json").write_text('{"model_max_length": 48}')
    return path


def make_tokenizer(path: Path, size: int) -> None:
    """Write a tokenizer.json of `size` tokens: bytes, an end of document and further words."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([f"<word {i}>" for i in range(size - len(letters) - 1)])
    assert tokenizer.get_vocab_size() == size
    tokenizer.save(str(path))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in all files of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def edit_settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in settings.items() if value is not ...}
    path.write_text(json.dumps(kept))


def edit_tensors(folder: Path, change) -> None:
    """Apply `change` to the table of tensors in model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
