"""Reads the shards of this rank from a checkpoint without executing code in its files."""

from dataclasses import replace
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.sharded.state_dict import Flat
from ee_llm.errors import CheckpointError

distributed.enable_megatron()
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
)


def read(reader: TensorReader, flat: Flat) -> dict[str, torch.Tensor]:
    """Read the shards of `flat` from a checkpoint and return them as tensors.

    A shard that is a single block of memory is read in place. Checks that the shards of all ranks
    cover every tensor. Collective.
    """
    return dist_checkpointing.load(
        dict(flat),
        str(reader.path / directory.TENSORS),
        sharded_strategy=_SafeTensors(reader),
        common_strategy=_NothingInCommon(),
    )


def place(model: Flat, loaded: dict[str, torch.Tensor]) -> None:
    """Copy the parameters that were not read in place because they are stored in several parts."""
    with torch.no_grad():
        for path, shard in model.items():
            if loaded[path].data_ptr() != shard.data.data_ptr():
                shard.data.copy_(loaded[path])


def read_under(reader: TensorReader, shard: Any, name: str) -> None:
    """Fill a parameter's shard with the corresponding part of the checkpoint's tensor `name`."""
    other = replace(shard, key=name)
    is_in_parts = isinstance(other, ShardedTensorFactory)
    parts = other.build() if is_in_parts else [other]
    filled = dict_list_map_outplace(_SafeTensors(reader).shard, parts)
    place({"": shard}, {"": other.merge_fn(filled) if is_in_parts else filled[0]})


class _SafeTensors(LoadShardedStrategy):
    """Reads shards with `TensorReader`, which unpickles only inert data."""

    can_handle_sharded_objects = True  # there are none

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any) -> dict[str, Any]:
        return dict_list_map_outplace(self.shard, sharded_state_dict)

    def shard(self, shard: ShardedTensor) -> torch.Tensor:
        """Fill the memory of a shard and return it."""
        assert not shard.prepend_axis_num, f"{shard.key}: layers must not share names"
        assert shard.flattened_range is None, f"{shard.key}: flattened shards are not supported"
        if shard.data is None:
            shard.init_data(distributed.device())
        target = shard.data.detach()
        self._reader.read_into(target, shard.key, shard.global_offset)
        return target

    def load_tensors_metadata(self, checkpoint_dir: Any) -> dict[str, Any]:
        raise NotImplementedError("names and shapes are compared before loading")

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        if loaded_backend != "torch_dist":
            raise CheckpointError(f"expected the format torch_dist, found {loaded_backend!r}")

    def check_version_compatibility(self, loaded_version: Any) -> None:
        if loaded_version != 1:
            raise CheckpointError(f"expected version 1 of torch_dist, found {loaded_version!r}")


class _NothingInCommon(LoadCommonStrategy):
    """Skips `common.pt`, a pickle that `check_common` has found to be empty."""

    can_handle_sharded_objects = True

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
        raise NotImplementedError("checkpoints hold tensors only")

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        pass

    def check_version_compatibility(self, loaded_version: Any) -> None:
        pass
