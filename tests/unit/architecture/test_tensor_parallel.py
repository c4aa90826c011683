"""The table of tensor-parallel splits. Every distributed run compares it with megatron-core's."""

import pytest
import torch

from ee_llm.architecture.tensor_parallel import (
    DIVIDED_SIZES,
    TensorSplit,
    group_qkv,
    tensor_split,
)
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.config import Config
from tests.unit.inference.models import tiny_config


def test_each_parameter_has_its_split() -> None:
    """A name that the table does not know would be replicated in silence."""
    names: dict[int | None, set[str]] = {}
    for family in ("llama", "gpt"):
        config = tiny_config(family, head=("block", "mlp", "norm"), output="own")
        for name in tensor_shapes(config):
            split = tensor_split(name, config.model)
            dim = None if split is None else split.dim
            names.setdefault(dim, set()).add(".".join(name.split(".")[-2:]))
            if split is not None:
                assert split.num_blocks == 1 + (family == "llama" and ".linear_fc1." in name)
    assert names[1] == {"linear_proj.weight", "linear_fc2.weight"}
    assert names[0] == {
        *("word.weight", "output.weight"),
        *("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias"),
    }
    assert all("norm" in n or n.endswith("bias") or "position" in n for n in names[None])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("split", [TensorSplit(0), TensorSplit(1), TensorSplit(0, num_blocks=2)])
def test_shards_join_to_the_parameter(split: TensorSplit, size: int) -> None:
    tensor = torch.arange(12 * 6).view(12, 6)
    shards = [split.shard(tensor, rank, size) for rank in range(size)]
    assert split.unsharded_shape(shards[0].shape, size) == (12, 6)
    joined = torch.empty_like(tensor)
    for rank, shard in enumerate(shards):
        split.write_shard(joined, shard, rank, size)
    assert torch.equal(joined, tensor)


def test_a_shard_of_a_gated_weight_has_its_part_of_both_halves() -> None:
    split = TensorSplit(0, num_blocks=2)
    assert split.shard(torch.arange(8), 1, 2).tolist() == [2, 3, 6, 7]


def test_a_shard_of_qkv_has_whole_heads() -> None:
    config = tiny_config(num_heads=4, num_kv_heads=2)
    name = "layers.1.self_attention.linear_qkv.weight"
    fused = torch.arange(tensor_shapes(config)[name][0])
    split = tensor_split(name, config.model)
    assert split is not None
    heads = group_qkv(config.model, fused)
    assert heads.shape == (2, 4, config.model.head_dim)
    for rank in range(2):
        shard = group_qkv(config.model, split.shard(fused, rank, 2))
        assert torch.equal(shard, heads[rank : rank + 1])


@pytest.mark.parametrize("name", DIVIDED_SIZES)
def test_the_configuration_checks_the_divided_sizes(name: str) -> None:
    config = tiny_config(**{name: {"num_kv_heads": 1}.get(name, 45)})
    values = config.model_dump() | {"parallel": {"tensor": 2}}
    with pytest.raises(ValueError, match=rf"model\.{name} = \d+ is not divisible"):
        Config(**values)
