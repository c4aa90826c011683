"""How tensor-parallel ranks split the parameters of a model, as in Megatron-LM (arXiv 1909.08053).

Training, inference, conversion and resharding share this table. config.checks states the sizes
that must be divisible once more, because `config` imports no other package.

Legend of shapes: h hidden, f feed-forward, g key/value heads, r queries per key/value head, d head
dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.config import ModelConfig

DIVIDED_SIZES = ("num_kv_heads", "ffn_hidden_size", "vocab_size")
"""Sizes of a model that the number of tensor ranks must divide."""

# The split dimension of a weight by the last part of its module's name: 0 splits the outputs
# (column-parallel), 1 the inputs (row-parallel). All other parameters are replicated.
_DIMS = {
    "word": 0,  # by vocabulary id
    "linear_qkv": 0,  # by key/value head, each with its queries: see `group_qkv`
    "linear_proj": 1,
    "linear_fc1": 0,
    "linear_fc2": 1,
    "output": 0,  # by vocabulary id
}


class TensorSplit(NamedTuple):
    """A split of one parameter into equal shards, one per tensor rank.

    dim: the dimension that is split.
    num_blocks: the number of equal blocks along `dim` that are split separately. A shard has its
    part of each block, in order: [gate; up] of a gated MLP are two blocks.
    """

    dim: int
    num_blocks: int = 1

    def parts(self, tensor: Tensor, size: int) -> list[Sequence[Tensor]]:
        """Return views of the parts of a whole parameter: one sequence per block, by rank."""
        blocks = tensor.chunk(self.num_blocks, dim=self.dim)
        return [block.chunk(size, dim=self.dim) for block in blocks]

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """Return a rank's shard of a whole parameter: a view of it if one part is all of it."""
        if size == 1:
            return tensor
        parts = [block[rank] for block in self.parts(tensor, size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def write_shard(self, tensor: Tensor, shard: Tensor, rank: int, size: int) -> None:
        """Copy a rank's shard to its place in a whole parameter."""
        pieces = shard.chunk(self.num_blocks, dim=self.dim)
        for block, piece in zip(self.parts(tensor, size), pieces, strict=True):
            block[rank].copy_(piece)

    def unsharded_shape(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Return the shape of a whole parameter from that of a shard."""
        return (*shape[: self.dim], shape[self.dim] * size, *shape[self.dim + 1 :])


def tensor_split(name: str, model: ModelConfig) -> TensorSplit | None:
    """Return how tensor ranks split the parameter `name`, or None if each rank has all of it.

    The bias of a row-parallel layer is added once, after the sum over ranks, and not split.
    """
    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    dim = _DIMS.get(leaf)
    if dim is None or (dim == 1 and kind == "bias"):
        return None
    is_gated = leaf == "linear_fc1" and model.family == "llama"
    return TensorSplit(dim, num_blocks=2 if is_gated else 1)


def group_qkv(model: ModelConfig, fused: Tensor, dim: int = 0) -> Tensor:
    """Return a view [.., g, r + 2, d, ..] of dimension `dim` of `linear_qkv` or its output.

    Each key/value head has its queries, its key and its value one after the other, so that a
    contiguous part of the rows has whole heads. Of a rank's shard, g are the heads of the rank.
    """
    queries = model.num_heads // model.num_kv_heads
    return fused.unflatten(dim, (-1, queries + 2, model.head_dim))
