"""The sharded tensors of a model and its optimizer under canonical names.

megatron-core's three optimizers describe their state in three ways, and the parallel layout of a
run determines its optimizer. This module maps all of them to the same tensors, so that a checkpoint
does not depend on the layout that wrote it:

    <name>                               the parameter
    optimizer.state.exp_avg.<name>       first moment, float32 (float64 in a float64 run)
    optimizer.state.exp_avg_sq.<name>    second moment
    optimizer.state.fp32_param.<name>    the master weight of a parameter that is not float32

The modules of megatron-core state how tensor ranks split the parameters; `model.initialize` asserts
that this agrees with `architecture.tensor_parallel`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from ee_llm import distributed
from ee_llm.checkpoint.read import MASTER
from ee_llm.config import Config

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer

# The distributed optimizer's prefix of a master weight. It has one for float32 parameters too.
_DISTRIBUTED_MASTER = "optimizer.state.param."

Flat = dict[str, Any]  # path in a state dict -> ShardedTensor or ShardedTensorFactory
Shapes = dict[str, tuple[int, ...]]  # name -> shape of the unsharded tensor


class ShardedModule(Protocol):
    """A stage, which describes its parameters as sharded tensors under canonical names."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]: ...


class Leaf(NamedTuple):
    """A value of a nested state dict, its container and its key."""

    path: str
    container: dict | list
    key: Any
    value: Any


def leaves(state: dict | list, path: str = "") -> Iterator[Leaf]:
    """Yield the values of nested dictionaries and lists, which may change during iteration."""
    items = list(state.items()) if isinstance(state, dict) else list(enumerate(state))
    for key, value in items:
        here = f"{path}/{key}"
        if isinstance(value, dict | list):
            yield from leaves(value, here)
        else:
            yield Leaf(here, state, key, value)


def metadata() -> dict[str, Any]:
    """Return the metadata for megatron-core's `sharded_state_dict` methods.

    `fully_reshardable` is the only format of the distributed optimizer that loads under any other
    layout. Gathering it over gloo keeps it on one rank per group instead of on every GPU.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(stages: Sequence[ShardedModule]) -> Flat:
    """Return the sharded tensors of this rank's stages, which share memory with the parameters.

    Other extra state of layers (Transformer Engine's `_extra_state`, pickled bytes) is omitted.
    """
    flat: Flat = {}
    for index, stage in enumerate(stages):
        state = stage.sharded_state_dict(metadata=metadata())
        for leaf in leaves(state, f"model{index}"):
            if isinstance(leaf.value, ShardedTensor | ShardedTensorFactory):
                flat[leaf.path] = leaf.value
            else:
                assert isinstance(leaf.value, ShardedObject), f"{leaf.path}: {type(leaf.value)}"
                assert leaf.value.key.endswith("_extra_state"), f"{leaf.value.key} is not a tensor"
    return flat


def trained(model: Flat) -> Flat:
    """Return the shards of `model` whose parameters are not frozen."""
    return {path: shard for path, shard in model.items() if shard.data.requires_grad}


class OptimizerState:
    """The state of a megatron-core optimizer as sharded tensors under canonical names."""

    def __init__(self, optimizer: MegatronOptimizer, model: Flat, *, is_loading: bool) -> None:
        """Describe `optimizer`, which updates the parameters in `model`. Collective when saving."""
        self._optimizer = optimizer
        self._dtypes = {shard.key: shard.data.dtype for shard in model.values()}
        self._is_loading = is_loading
        _allocate_moments(optimizer)
        self._state = optimizer.sharded_state_dict(
            dict(model), is_loading=is_loading, metadata=metadata()
        )
        for leaf in leaves(self._state):
            if isinstance(leaf.value, ShardedTensor | ShardedTensorFactory):
                leaf.container[leaf.key] = self._canonical(leaf.value)

    def tensors(self) -> Flat:
        """Return the sharded tensors to save or load."""
        return {
            f"optimizer{leaf.path}": leaf.value
            for leaf in leaves(self._state)
            if isinstance(leaf.value, ShardedBase)
        }

    def load(self, loaded: dict[str, torch.Tensor], step: int) -> None:
        """Load the values of `tensors()` and the number of steps into the optimizer."""
        for leaf in leaves(self._state):
            if isinstance(leaf.value, ShardedBase):
                leaf.container[leaf.key] = loaded[f"optimizer{leaf.path}"]
            elif isinstance(leaf.value, LocalNonpersistentObject):
                leaf.container[leaf.key] = leaf.value.unwrap()
        inner = self._state.get("optimizer", self._state)
        for group in inner["param_groups"]:
            group["step"] = step
        with torch.no_grad():
            self._optimizer.load_state_dict(self._state)

    def _canonical(self, shard: Any) -> Any:
        if not shard.key.startswith(_DISTRIBUTED_MASTER):
            return shard
        name = shard.key.removeprefix(_DISTRIBUTED_MASTER)
        if self._dtypes[name] != torch.float32:
            return replace(shard, key=MASTER + name)
        if not self._is_loading:
            return LocalNonpersistentObject(None)  # equal to the parameter, which is saved
        # Read it from the parameter's tensor, as a replica, because the parameter is its owner.
        return replace(shard, key=name, replica_id=(0, 0, 1))


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates made by this rank's optimizer."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    # They do not exist before the first step, and a checkpoint without them would not load.
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def tensor_shapes(flat: Flat) -> Shapes:
    """Return the unsharded shapes of the tensors in `flat` by their stored names."""
    shapes: Shapes = {}
    for value in flat.values():
        built = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        for leaf in leaves(built):
            shapes[leaf.value.key] = tuple(leaf.value.global_shape)
    return shapes


def unbuilt_shapes(config: Config, built: Shapes) -> Shapes:
    """Return the names and shapes of the tensors that a tuning run does not build.

    `built` has all tensors that it builds. The other layers have the tensors of layer 1, and the
    other early exits those of a tuned one. A run that trains the whole model builds all tensors.
    """
    if not config.is_tuning:
        return {}

    def like(template: str, name: str) -> Shapes:
        return {
            name + key.removeprefix(template): shape
            for key, shape in built.items()
            if key.startswith(template)
        }

    final = config.model.num_layers
    whole = like("layers.1.input_layernorm.", f"exits.{final}.norm.")
    for number in range(2, final + 1):
        whole |= like("layers.1.", f"layers.{number}.")
    for boundary in config.exits.boundaries:
        whole |= like(f"exits.{config.tuning.exits[0]}.", f"exits.{boundary}.")
    if not config.model.tie_embeddings:
        whole["output.weight"] = built["embedding.word.weight"]
    return {name: shape for name, shape in whole.items() if name not in built}
