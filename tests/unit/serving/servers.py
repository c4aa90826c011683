"""Models to serve in tests."""

from pathlib import Path

import torch

from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from tests.unit.inference.models import random_tensors, tiny_config


def save(output: Path, **config: object) -> Path:
    """Write a checkpoint of a random model whose tokens are bytes."""
    made = tiny_config(**{"vocab_size": 264, "max_seq_length": 64} | config)
    tensors = random_tensors(made, dtype=torch.float32)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_checkpoint(output, made, specs, tensors.__getitem__, tokenizer_file="bytes")
