"""A tiny model with every kind of split tensor, trained, saved and loaded in any layout."""

import hashlib
from dataclasses import replace

import torch

from ee_llm import distributed
from ee_llm.checkpoint.sharded.load import load
from ee_llm.checkpoint.sharded.save import save
from ee_llm.checkpoint.sharded.state_dict import leaves, model_state
from ee_llm.checkpoint.state import TrainState
from ee_llm.config import Config, load_config
from ee_llm.training.optimizer import (
    build_optimizer,
    set_learning_rate,
    take_step,
    wrap_stages,
)

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

NUM_LAYERS, HIDDEN, FFN, VOCAB = 4, 8, 12, 16


class Layer(MegatronModule):
    """A norm, the two projections of SwiGLU and a bias: every way to split a tensor."""

    def __init__(self, config):
        super().__init__(config)
        plain = {"config": config, "init_method": torch.nn.init.zeros_, "skip_bias_add": False}
        self.norm = torch.nn.RMSNorm(HIDDEN, dtype=config.params_dtype)
        self.fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, bias=False, **plain)
        self.fc2 = RowParallelLinear(FFN, HIDDEN, bias=True, input_is_parallel=True, **plain)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        for name, module in self.named_children():
            group = parallel_state.get_tensor_model_parallel_group()
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group
            )
        weight = f"{prefix}fc1.weight"
        factory = apply_swiglu_sharded_factory(state[weight], sharded_offsets)
        if ".1." in prefix:  # its parts are copies of the parameter, which factories may return
            build = factory.build_fn
            factory.build_fn = lambda *given: [
                replace(part, data=part.data.clone()) for part in build(*given)
            ]
        state[weight] = factory
        return state


class Toy(MegatronModule):
    """A pipeline stage of layers; the word embedding is on the first and, tied, on the last."""

    def __init__(self, config, grid):
        super().__init__(config)
        self.is_copy = grid.pipeline_rank > 0
        share = NUM_LAYERS // grid.pipeline_size
        first = 1 + share * grid.pipeline_rank
        self.layers = torch.nn.ModuleDict(
            {str(n): Layer(config) for n in range(first, first + share)}
        )
        if grid.pipeline_rank in (0, grid.pipeline_size - 1):
            self.word = VocabParallelEmbedding(
                VOCAB, HIDDEN, init_method=torch.nn.init.zeros_, config=config
            )
            self.word.weight.shared = self.is_copy

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        for n, layer in self.layers.items():
            state |= layer.sharded_state_dict(f"{prefix}layers.{n}.", sharded_offsets, metadata)
        if hasattr(self, "word"):
            state |= self.word.sharded_state_dict("embedding.word.", sharded_offsets, metadata)
            shard = state["embedding.word.weight"]
            shard.replica_id = (int(self.is_copy), *shard.replica_id[1:])
        return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def make_config(output, **overrides) -> Config:
    return load_config(
        None,
        {
            "output": str(output),
            "model.num_layers": NUM_LAYERS,
            "model.hidden_size": HIDDEN,
            "model.num_heads": 2,
            "model.vocab_size": 256,
            "checkpoint.keep_last": 2,
            "optimizer.clip_grad": 0.05,
            "optimizer.lr": 1e-2,
        }
        | overrides,
    )


class Run:
    """The tiny model in one layout, trained with gradients that depend on (name, step)."""

    def __init__(self, output, layout, dtype=torch.float32, **overrides):
        tensor, pipeline = layout
        self.grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=20, seed=5)
        self.config = make_config(output, **overrides)
        self.dtype = dtype
        transformer = TransformerConfig(
            num_layers=NUM_LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=2,
            tensor_model_parallel_size=tensor,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=True,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=False,
        )
        self.toy = Toy(transformer, self.grid)
        self.shards = model_state([self.toy])
        for shard in self.shards.values():
            _assign(shard, shard.data, "weight")
        self.stages = wrap_stages(
            [self.toy], transformer, data_size=self.grid.data_size, dtype=dtype
        )
        self.optimizer = build_optimizer(
            self.stages, self.config.optimizer, data_size=self.grid.data_size, dtype=dtype
        )

    def train(self, first, last):
        norms = []
        for step in range(first, last + 1):
            self.stages[0].zero_grad_buffer()
            self.optimizer.zero_grad()
            for shard in self.shards.values():
                _assign(shard, shard.data.main_grad, f"gradient {step}")
            set_learning_rate(self.optimizer, 1e-2 / step)
            norms.append(take_step(self.optimizer, clip_grad=0.05).grad_norm)
        return norms

    def save(self, step):
        state = TrainState(step=step, consumed_samples=8 * step, extra={"note": "é"})
        return save(self.config.output, [self.toy], self.optimizer, state, self.config)

    def load(self, path=None, optimizer=True):
        return load(
            path or self.config.output,
            [self.toy],
            self.optimizer if optimizer else None,
            self.config,
        )

    def weights(self):
        """Return the digest of every local shard, by name and place in the unsharded tensor."""
        found = {}
        for shard in self.shards.values():
            for part in _parts(shard):
                place = (part.key, part.global_offset, part.local_shape)
                found[place] = part.data.detach().to(torch.float64).clone()
        return found


def _parts(shard):
    return [leaf.value for leaf in leaves(shard.build())] if hasattr(shard, "build") else [shard]


def unsharded_tensor(name, shape, purpose):
    seed = int.from_bytes(hashlib.sha256(f"{name} {purpose}".encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assign(shard, target, purpose):
    """Fill a local tensor with its part of a global one that depends on name and purpose."""
    parts = [
        unsharded_tensor(part.key, part.global_shape, purpose)[part.global_slice()]
        for part in _parts(shard)
    ]
    with torch.no_grad():
        target.copy_(torch.cat(parts))


def save_run(output, layout, dtype=torch.float32, step=3):
    run = Run(output, layout, dtype)
    run.train(1, step)
    run.save(step)
    return run.train(step + 1, step + 2), run.weights()


def union(results):
    """Assemble the shards of all ranks into unsharded tensors; replicas must be bit-identical."""
    wholes = {}
    for _, shards in results:
        for (name, offset, shape), data in shards.items():
            wholes.setdefault(name, {}).setdefault((offset, shape), data)
            assert torch.equal(wholes[name][offset, shape], data), f"replicas of {name} differ"
    assembled = {}
    for name, shards in wholes.items():
        size = [max(o[d] + s[d] for o, s in shards) for d in range(len(next(iter(shards))[0]))]
        whole = torch.full(size, torch.nan, dtype=torch.float64)
        for (offset, shape), data in shards.items():
            whole[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))] = data
        assembled[name] = whole
    return assembled
