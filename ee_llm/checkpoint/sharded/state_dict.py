"""What is stored of a model and its optimizer: named, sharded tensors and one step count.

megatron-core's three optimizers describe their state in three ways, and a run's layout decides
which one it has. Here all of them become the same tensors, so that a checkpoint does not depend
on the layout that wrote it:

    <name>                               the parameter
    optimizer.state.exp_avg.<name>       first moment, float32 (float64 in a float64 run)
    optimizer.state.exp_avg_sq.<name>    second moment
    optimizer.state.fp32_param.<name>    the master weight of a parameter that is not float32
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

# What the distributed optimizer calls a master weight; it has one for float32 parameters too.
_DISTRIBUTED_MASTER = "optimizer.state.param."

Flat = dict[str, Any]  # path in a state -> ShardedTensor or ShardedTensorFactory
Shapes = dict[str, tuple[int, ...]]  # name -> shape of the whole tensor


class ShardedModule(Protocol):
    """A stage: it describes its live parameters as sharded tensors by canonical name."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]: ...


class Leaf(NamedTuple):
    """A value of a nested state, and where it is."""

    path: str
    container: dict | list
    key: Any
    value: Any


def leaves(state: dict | list, path: str = "") -> Iterator[Leaf]:
    """Yield the values of nested dictionaries and lists; containers may be changed meanwhile."""
    items = list(state.items()) if isinstance(state, dict) else list(enumerate(state))
    for key, value in items:
        here = f"{path}/{key}"
        if isinstance(value, dict | list):
            yield from leaves(value, here)
        else:
            yield Leaf(here, state, key, value)


def metadata() -> dict[str, Any]:
    """Return what megatron-core's `sharded_state_dict` methods want to know.

    `fully_reshardable` is the one format of the distributed optimizer that loads under any other
    layout; gathering it over gloo keeps it on one rank per group instead of on every GPU.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(stages: Sequence[ShardedModule]) -> Flat:
    """Return the sharded tensors of this rank's stages; their data are the live parameters.

    Non-tensor extras of layers (Transformer Engine's `_extra_state`, pickled bytes) are left out.
    """
    flat: Flat = {}
    for index, stage in enumerate(stages):
        state = stage.sharded_state_dict(metadata=metadata())
        for leaf in leaves(state, f"model{index}"):
            if isinstance(leaf.value, ShardedTensor | ShardedTensorFactory):
                flat[leaf.path] = leaf.value
            else:
                assert isinstance(leaf.value, ShardedObject), f"{leaf.path}: {type(leaf.value)}"
                assert leaf.value.key.endswith("_extra_state"), f"{leaf.value.key} is no tensor"
    return flat


def trained(model: Flat) -> Flat:
    """Return the shards of `model` whose parameters are trained; the others are frozen."""
    return {path: shard for path, shard in model.items() if shard.data.requires_grad}


class OptimizerState:
    """The state of megatron-core's optimizer, as sharded tensors and as itself."""

    def __init__(self, optimizer: MegatronOptimizer, model: Flat, *, is_loading: bool) -> None:
        """Describe `optimizer`, whose parameters `model` holds. Collective when saving."""
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
        """Return the sharded tensors that are to be saved or loaded."""
        return {
            f"optimizer{leaf.path}": leaf.value
            for leaf in leaves(self._state)
            if isinstance(leaf.value, ShardedBase)
        }

    def load(self, loaded: dict[str, torch.Tensor], step: int) -> None:
        """Give the optimizer the loaded `tensors()` and the number of steps it has taken."""
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
        # Read once more from the parameter's own tensor; as a replica, for it has an owner already.
        return replace(shard, key=name, replica_id=(0, 0, 1))


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates that this rank's optimizer has made."""
    return max((int(group.get("step", 0)) for group in optimizer.param_groups), default=0)


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    # Before the first step there are none, and a checkpoint without them would not load.
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def tensor_shapes(flat: Flat) -> Shapes:
    """Return the names under which `flat` is stored, with the global shapes."""
    shapes: Shapes = {}
    for value in flat.values():
        built = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        for leaf in leaves(built):
            shapes[leaf.value.key] = tuple(leaf.value.global_shape)
    return shapes


def unbuilt_shapes(config: Config, built: Shapes) -> Shapes:
    """Return names and shapes of what a tuning run leaves out of the model, given all it builds.

    Every layer has the tensors of layer 1, every early exit those of one that is tuned. Where the
    whole model is trained nothing is left out.
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
