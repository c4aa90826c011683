"""Preset model shapes, and sizes derived from other sizes."""

from typing import Any

# The sizes of EE-LLM (arXiv 2312.04916), and one that a laptop's CPU can train. The vocabulary
# depends on the tokenizer rather than on the shape: these vocabulary sizes are starting points, to
# be overridden.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "num_layers": 8,
        "hidden_size": 288,
        "num_heads": 6,
        "vocab_size": 4096,
        "max_seq_length": 256,
    },
    "llama-1.3B": {"num_layers": 24, "hidden_size": 2048, "num_heads": 32},
    "llama-7B": {"num_layers": 32, "hidden_size": 4096, "num_heads": 32},
    "llama-13B": {"num_layers": 40, "hidden_size": 5120, "num_heads": 40},
    "llama-30B": {"num_layers": 60, "hidden_size": 6656, "num_heads": 52},
}
_LARGE = {"vocab_size": 32000, "max_seq_length": 2048}

# Options that describe the architecture; a shape given on the command line replaces them.
SHAPE_FIELDS = (
    "family",
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_hidden_size",
    "position",
    "qkv_bias",
    "qk_norm",
    "gelu",
)


def shape_fields(name: str) -> dict[str, Any]:
    """Return the model options of the shape `name`; raises `KeyError` for an unknown name."""
    return {"family": "llama", **_LARGE, **SHAPES[name]}


def ffn_size(family: str, hidden_size: int) -> int:
    """Return the usual MLP width: 4h for gpt, 8/3 h rounded up to a multiple of 256 for llama.

    SwiGLU has three matrices where GELU has two, hence two thirds of the width at equal cost
    (Shazeer 2020, arXiv 2002.05202).
    """
    if family == "gpt":
        return 4 * hidden_size
    return -(-8 * hidden_size // (3 * 256)) * 256
