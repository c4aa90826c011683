"""The options of `ee-llm convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ee_llm.config import HeadPart


@dataclass(frozen=True)
class ConvertOptions:
    """Turn a model of Hugging Face's or Megatron-LM's into a checkpoint, or a checkpoint back.

    On the CPU, tensor by tensor; the result is there as a whole or not at all.
    """

    source: Positional[Path]
    """A folder with config.json and model.safetensors; a GGUF file; the id of a model on the
    Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M-Instruct; a run directory of Megatron-LM or
    EE-LLM, or a checkpoint in it; or an ee-llm checkpoint or run directory."""

    output: Path
    """Where the result goes: a new run directory, or for --to hf a new folder."""

    to: Literal["ee-llm", "hf", "int8"] = "ee-llm"
    """ee-llm: a checkpoint to train, tune and decode with. hf: a folder for transformers. int8: a
    checkpoint to decode with, of a checkpoint of ours, whose linear weights have 8 bits."""

    exits: tuple[int, ...] = ()
    """From elsewhere: exits to make after these layers, of the model's own norm and output. For
    LayerSkip's models that is what they were trained with; others need tuning."""

    head: tuple[HeadPart, ...] = ("norm",)
    """What those exits are made of, each part copied from the model's own."""

    exit_output: Literal["shared", "own", "tied"] = "shared"
    """Their output weight: the final exit's, a copy of it each, or the word embedding."""

    dense: bool = False
    """From a checkpoint: leave its exits out."""

    truncate_at: int | None = None
    """From a checkpoint: the smaller model that ends with the exit after this layer."""

    tokenizer: str | None = None
    """From elsewhere: 'bytes' or the path of a tokenizer, if the folder has none; Megatron-LM's
    never have one."""

    strict: bool = False
    """From Hugging Face: refuse settings of config.json whose meaning is unknown, instead of
    listing them in a note."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """For a GGUF file: type of the dequantised weights. Default: that of the file's matrices where
    they have one floating type, else bfloat16."""

    revision: str | None = None
    """For a model of the Hugging Face hub: a branch, tag or commit. Default: the main branch."""

    max_shard_gb: float = 5.0
    """For --to hf: size of a file after which the next one begins, in GB."""

    check: bool = False
    """Compare the logits of every exit before and after, in float32; needs transformers, and memory
    for both models."""

    text: str | None = None
    """The text to compare them on; one of our own unless given."""

    json: bool = False
    """Print one JSON object and nothing else."""
