"""The sections of the configuration that describe the model and the dropout of its layers."""

from typing import Any, Literal

from pydantic import model_validator

from ee_llm.config.base import Section, fill, option
from ee_llm.config.limits import (
    MAX_FACTOR,
    MAX_FLOAT,
    MAX_LAYERS,
    MAX_SEQ_LENGTH,
    MAX_VOCAB_SIZE,
    MAX_WIDTH,
)
from ee_llm.config.shapes import SHAPES, ffn_size, shape_fields
from ee_llm.errors import ConfigError


class ModelConfig(Section):
    """The transformer: family, sizes and initialization."""

    shape: str | None = option(
        None,
        "Preset of sizes: " + ", ".join(SHAPES) + ". Other options override its values.",
        shown="none",
    )
    family: Literal["llama", "gpt"] = option(
        "llama",
        "Architecture. llama: RMSNorm, SwiGLU, no biases (except with qkv_bias). gpt: LayerNorm, "
        "GELU, biases.",
    )
    num_layers: int = option(
        0, "Number of transformer layers.", shown="from shape", gt=0, le=MAX_LAYERS
    )
    hidden_size: int = option(
        0, "Width of the residual stream.", shown="from shape", gt=0, le=MAX_WIDTH
    )
    num_heads: int = option(
        0, "Number of attention (query) heads.", shown="from shape", gt=0, le=MAX_WIDTH
    )
    num_kv_heads: int = option(
        0,
        "Number of key and value heads; fewer than num_heads gives grouped-query attention.",
        shown="num_heads",
        gt=0,
        le=MAX_WIDTH,
    )
    head_dim: int = option(
        0, "Width of an attention head.", shown="hidden_size / num_heads", gt=0, le=MAX_WIDTH
    )
    ffn_hidden_size: int = option(
        0,
        "Width of the MLP.",
        shown="llama: 8/3 hidden_size rounded up to a multiple of 256; gpt: 4 hidden_size",
        gt=0,
        le=MAX_WIDTH,
    )
    vocab_size: int = option(
        0,
        "Size of the vocabulary (rows of the embedding): at least that of the tokenizer, and a "
        "multiple of parallel.tensor.",
        shown="from shape",
        gt=0,
        le=MAX_VOCAB_SIZE,
    )
    max_seq_length: int = option(
        2048,
        "Maximum sequence length, in tokens.",
        shown="from shape, else 2048",
        gt=0,
        le=MAX_SEQ_LENGTH,
    )
    position: Literal["rope", "learned"] = option(
        "rope", "Rotary or learned position embedding.", shown="llama: rope; gpt: learned"
    )
    rope_theta: float = option(10000.0, "Base of the rotary frequencies.", gt=0, le=MAX_FLOAT)
    rope_scaling: Literal["none", "linear", "llama3"] = option(
        "none",
        "Scaling of the rotary frequencies, for longer sequences than in pre-training. linear: "
        "divides all frequencies by rope_factor. llama3: divides only low ones, as in Llama 3.1.",
    )
    rope_factor: float = option(
        1.0, "Divisor of the frequencies, for linear and llama3.", gt=0, le=MAX_FACTOR
    )
    rope_low_freq_factor: float = option(
        1.0,
        "For llama3: frequencies with fewer rotations than this in rope_original_length tokens are "
        "divided by the full rope_factor.",
        gt=0,
        le=MAX_FACTOR,
    )
    rope_high_freq_factor: float = option(
        4.0,
        "For llama3: frequencies with more rotations than this are not divided.",
        gt=0,
        le=MAX_FACTOR,
    )
    rope_original_length: int = option(
        8192, "For llama3: sequence length in pre-training, in tokens.", gt=0, le=MAX_SEQ_LENGTH
    )
    qkv_bias: bool = option(
        False,
        "Add biases to the projections of queries, keys and values; gpt always has them.",
        shown="llama: false; gpt: true",
    )
    qk_norm: bool = option(
        False,
        "Apply RMSNorm over head_dim to queries and keys, before the rotary embedding.",
    )
    gelu: Literal["erf", "tanh"] = option(
        "erf", "GELU of gpt: exact (erf), or the tanh approximation, which GPT-2 uses."
    )
    norm_eps: float = option(1e-5, "Epsilon that norms add to the variance.", gt=0, le=1)
    tie_embeddings: bool = option(
        False, "Use the word embedding as the final exit's output weight."
    )
    dropout: float = option(
        0.0, "Probability of dropout on hidden states and attention weights.", ge=0, lt=1
    )
    init_std: float = option(0.02, "Standard deviation of initial weights.", gt=0, le=MAX_FACTOR)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("shape")
        if isinstance(name, str):
            if name not in SHAPES:
                raise ConfigError(
                    f"model.shape = {name!r} does not exist. Choose one of {', '.join(SHAPES)}."
                )
            given = fill(given, shape_fields(name).items())
        needed = ("num_layers", "hidden_size", "num_heads", "vocab_size")
        missing = [f"model.{name}" for name in needed if given.get(name) is None]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)}: missing. Set each to a number, or set model.shape to one "
                f"of {', '.join(SHAPES)}."
            )
        family = given.get("family", "llama")
        hidden_size, num_heads = given.get("hidden_size"), given.get("num_heads")
        sizes_known = all(type(n) is int and n > 0 for n in (hidden_size, num_heads))
        if sizes_known and given.get("head_dim") is None and hidden_size % num_heads:
            raise ConfigError(
                f"model.hidden_size = {hidden_size} is not divisible by model.num_heads = "
                f"{num_heads}. Change one of them or set model.head_dim."
            )
        # If a size is not valid, report only that: the placeholder 1 causes no further errors.
        derived = {
            "position": "learned" if family == "gpt" else "rope",
            "qkv_bias": family == "gpt",
            "num_kv_heads": num_heads if sizes_known else 1,
            "head_dim": hidden_size // num_heads if sizes_known else 1,
            "ffn_hidden_size": ffn_size(family, hidden_size) if sizes_known else 1,
        }
        given = fill(given, derived.items())
        return given


class LayerDropoutConfig(Section):
    """Layer dropout: training skips layers at random, later layers more often (LayerSkip)."""

    max_probability: float = option(
        0.0,
        "Probability that a sample skips the last layer. The probability of a layer grows with its "
        "depth, from 0 for the first layer.",
        ge=0,
        lt=1,
    )
    schedule: Literal["constant", "exponential"] = option(
        "constant",
        "Schedule of the probabilities over the steps. constant: to continue the training of a "
        "model. exponential: from 0 in the first step, for training from scratch.",
    )
