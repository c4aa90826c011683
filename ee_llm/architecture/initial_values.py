"""What parameters begin with: drawn as a function of (seed, name), or copied from the model.

Training and the making of checkpoints share it, so that an exit is the same whoever adds it.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from ee_llm.config import Config


def initial_value(name: str, shape: Sequence[int], config: Config) -> torch.Tensor:
    """Return the initial value of a whole parameter in float32.

    Norms start at 1 and biases at 0; weights are normal with `model.init_std`, those that write
    into the residual stream with init_std / sqrt(2 L) (GPT-2; Megatron-LM).
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.model.init_std
    if ".linear_proj." in name or ".linear_fc2." in name:
        std /= math.sqrt(2 * config.model.num_layers)
    digest = hashlib.sha256(f"{config.training.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def copy_source(name: str, config: Config) -> str | None:
    """Return the parameter of the model that an exit's parameter `name` is copied from.

    The norm is the final one, the output weight that of the final exit. An `mlp` that stands in for
    that of its layer is that MLP, its norm included, so that the exit begins as the plain one
    (EE-Tuning, arXiv 2402.00518); a block is the next layer. An `mlp` behind a block has no
    counterpart, and None is returned: as drawn, it adds little to its input.
    """
    _, boundary, rest = name.split(".", 2)
    if rest.startswith("block."):
        return f"layers.{int(boundary) + 1}.{rest.removeprefix('block.')}"
    if rest.startswith(("mlp.", "mlp_norm.")):
        if "block" in config.exits.head:
            return None
        return f"layers.{boundary}.{rest.replace('mlp_norm.', 'pre_mlp_layernorm.')}"
    if rest.startswith("norm."):
        return f"exits.{config.model.num_layers}.{rest}"
    assert rest == "output.weight", f"{name} is no parameter of an exit"
    return "embedding.word.weight" if config.model.tie_embeddings else rest
