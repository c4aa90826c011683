"""Initial values of parameters: drawn as a function of (seed, name), or copied from the model.

Training, conversion and checkpoint surgery share this module, so that an exit has the same initial
values whichever of them adds it.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from ee_llm.config import Config


def initial_value(name: str, shape: Sequence[int], config: Config) -> torch.Tensor:
    """Return the initial value of an unsharded parameter in float32.

    Norm weights are 1, biases 0, and a translator is the identity. Other weights are drawn from a
    normal distribution whose standard deviation is `model.init_std`, or init_std / sqrt(2 L) for
    weights that write into the residual stream of L layers (GPT-2; Megatron-LM).
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if name.endswith(".translator.weight"):
        return torch.eye(*shape)
    std = config.model.init_std
    if ".linear_proj." in name or ".linear_fc2." in name:
        std /= math.sqrt(2 * config.model.num_layers)
    digest = hashlib.sha256(f"{config.training.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def is_exit_norm(name: str) -> bool:
    """Return whether a parameter is of an exit's norm, the final one included."""
    return name.startswith("exits.") and ".norm." in name


def copy_source(name: str, config: Config) -> str | None:
    """Return the name of the parameter that an exit's parameter `name` is copied from.

    A norm is copied from the final norm, an output weight from the final exit's, and a block from
    the next layer. An `mlp` that replaces its layer's MLP is copied from that MLP and its norm, so
    that the exit starts out equal to one without an `mlp` (EE-Tuning, arXiv 2402.00518). The result
    is None for parts without a counterpart: a translator, whose initial value is the identity, and
    an `mlp` behind a block, whose random initial values add little to its input.
    """
    _, boundary, rest = name.split(".", 2)
    if rest.startswith("block."):
        return f"layers.{int(boundary) + 1}.{rest.removeprefix('block.')}"
    if rest.startswith(("mlp.", "mlp_norm.")):
        if "block" in config.exits.head:
            return None
        return f"layers.{boundary}.{rest.replace('mlp_norm.', 'pre_mlp_layernorm.')}"
    if rest.startswith("translator."):
        return None
    if rest.startswith("norm."):
        return f"exits.{config.model.num_layers}.{rest}"
    assert rest == "output.weight", f"{name} is not a parameter of an exit"
    return "embedding.word.weight" if config.model.tie_embeddings else rest
