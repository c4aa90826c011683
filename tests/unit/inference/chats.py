"""Create checkpoints of tiny random models with tokenizers of well-known families."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from tests.unit.data.tokenization.families import write_family
from tests.unit.inference.models import random_tensors, tiny_config

FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


def save_family(
    output: Path, name: str, tensors: dict[str, Tensor] | None = None, **model: Any
) -> Path:
    """Write a checkpoint like that of a converted model of the family."""
    folder = write_family(name, output.parent / f"{output.name}-hub")
    config = tiny_config(vocab_size=640, max_seq_length=256, **model)
    tensors = tensors or random_tensors(config, dtype=torch.float32)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    files = {f"huggingface/{file}": (folder / file).read_bytes() for file in FILES}
    tokenizer = str(folder / "tokenizer.json")
    get = tensors.__getitem__
    return write_checkpoint(output, config, specs, get, tokenizer_file=tokenizer, files=files)
