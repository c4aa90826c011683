"""The options of a conversion."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ee_llm.config import HeadPart


@dataclass(frozen=True)
class ConvertOptions:
    """The options of a conversion; the command line has the same."""

    source: Path
    """The model: a folder with config.json and model.safetensors; a GGUF file; the id of a model on
    the Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M-Instruct; a run directory of
    Megatron-LM or EE-LLM, or a checkpoint in it; or an ee-llm checkpoint or run directory."""

    output: Path
    """Run directory to create for the result, or folder to create for --to hf."""

    to: Literal["ee-llm", "hf", "int8"] = "ee-llm"
    """Format of the result. ee-llm: a checkpoint for training, tuning and inference. hf: a folder
    for transformers. int8: an ee-llm checkpoint for inference, with linear weights in 8 bits; the
    source is an ee-llm checkpoint."""

    exits: tuple[int, ...] = ()
    """Layers after which to add exits, which are copies of the model's own norm and output weight.
    LayerSkip's models are trained for such exits; exits of other models need tuning."""

    head: tuple[HeadPart, ...] = ("norm",)
    """Parts of the new exits, each copied from the model."""

    exit_output: Literal["shared", "own", "tied"] = "shared"
    """Output weight of the new exits: shared with the final exit, a copy of it for each, or tied to
    the word embedding."""

    dense: bool = False
    """Remove the exits of an ee-llm checkpoint."""

    truncate_at: int | None = None
    """Cut an ee-llm checkpoint to the smaller model that ends with the exit after this layer."""

    tokenizer: str | None = None
    """Tokenizer of a model that comes without one, as Megatron-LM's do: 'bytes' or a path."""

    strict: bool = False
    """Refuse settings of a Hugging Face config.json whose meaning is unknown. (default: list them
    in a note)"""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the dequantized weights of a GGUF file. (default: that of the file's matrices if they
    have one floating-point type, else bfloat16)"""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub. (default: the main branch)"""

    max_shard_gb: float = 5.0
    """For --to hf: size at which a new file begins, in GB."""

    check: bool = False
    """Compare the logits of every exit before and after, in float32. This needs transformers, and
    memory for both models."""

    text: str | None = None
    """Text on which --check compares the logits. (default: a built-in text)"""
