"""The options of `ee-llm convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ee_llm.config import HeadPart


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a model of Hugging Face or Megatron-LM to a checkpoint, or a checkpoint back.

    Conversion runs on the CPU with memory for a few tensors, and writes the result atomically.
    """

    source: Positional[Path]
    """A folder with config.json and model.safetensors; a GGUF file; the id of a model on the
    Hugging Face Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct; a run directory of Megatron-LM or
    EE-LLM, or a checkpoint in it; or an ee-llm checkpoint or run directory."""

    output: Path
    """Write the result to this new run directory, or with --to hf to this new folder."""

    to: Literal["ee-llm", "hf", "int8"] = "ee-llm"
    """Write a checkpoint for training, tuning and inference (ee-llm), a folder for transformers
    (hf), or, from an ee-llm checkpoint, one for inference with 8-bit linear weights (int8)."""

    exits: tuple[int, ...] = ()
    """Add exits after these layers as copies of the final norm and output, when converting to a
    checkpoint. LayerSkip's models were trained with such exits; others need tuning."""

    head: tuple[HeadPart, ...] = ("norm",)
    """Parts of the added exits, each copied from the model."""

    exit_output: Literal["shared", "own", "tied"] = "shared"
    """Output weight of the added exits: the final exit's, a copy of it per exit, or the word
    embedding."""

    dense: bool = False
    """Remove the exits of a checkpoint."""

    truncate_at: int | None = None
    """Cut the model of a checkpoint off after this layer; its exit becomes the output."""

    tokenizer: str | None = None
    """Use this tokenizer, 'bytes' or a path, when converting to a checkpoint. Needed if the source
    has none, as in Megatron-LM. Default: the source's own."""

    strict: bool = False
    """Reject settings of config.json whose meaning is unknown, instead of listing them in a
    note."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the dequantized weights of a GGUF file. Default: the dtype of the file's matrices if
    all have the same floating-point one, else bfloat16."""

    revision: str | None = None
    """Download this branch, tag or commit from the Hugging Face Hub. Default: the main branch."""

    max_shard_gb: float = 5.0
    """Maximum size of a file with --to hf, in GB."""

    check: bool = False
    """Compare the logits of every exit before and after conversion, in float32. Needs transformers
    and memory for both models."""

    text: str | None = None
    """Text on which --check compares the logits. Default: a built-in sentence."""

    json: bool = False
    """Print the result as a JSON object, and nothing else."""
