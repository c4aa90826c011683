"""Which tensors of ours are made of which of theirs: a table per family, read in both directions.

Legend of shapes: h hidden, f feed-forward, g key/value heads, r queries per key/value head, d head
dimension, x anything.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.architecture.initial_values import copy_source
from ee_llm.architecture.tensor_parallel import group_qkv
from ee_llm.architecture.tensors import tensor_shapes
from ee_llm.config import Config, ModelConfig
from ee_llm.errors import ConversionError

OURS = "ee_llm."
"""What stands before the name of a tensor of an exit that no other software knows."""


class Fusion(NamedTuple):
    """How a tensor of ours is put together from theirs, and taken apart again."""

    join: Callable[[ModelConfig, Sequence[Tensor]], Tensor]
    split: Callable[[ModelConfig, Tensor], Sequence[Tensor]]


class Row(NamedTuple):
    """A tensor of ours and those of theirs that it is made of.

    In a family's table {n} stands for the number of a layer (from 1), {i} for the same from 0, and
    {last} for the last layer's.
    """

    ours: str
    theirs: tuple[str, ...]
    fusion: Fusion

    def shapes(self, model: ModelConfig, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shapes of theirs, from that of ours."""
        whole = torch.empty(ours, device="meta")
        return [tuple(part.shape) for part in self.fusion.split(model, whole)]


class Table(NamedTuple):
    """The rows of a family.

    `output` is the key of the final exit's weight, which may be there although it is tied to the
    key `words`. `optional_prefix` may be missing in all keys. `buffers` end the keys of what some
    versions saved and nothing reads.
    """

    rows: tuple[Row, ...]
    words: str
    output: str = "lm_head.weight"
    optional_prefix: str = ""
    buffers: tuple[str, ...] = ()

    def is_buffer(self, key: str) -> bool:
        """Return whether a key is that of a buffer, which holds no weights."""
        return key.endswith(self.buffers) if self.buffers else False


def _join_qkv(model: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """Return [g, r + 2, d] x h, flat: each key/value head has its queries, its key, its value."""
    groups = (model.num_kv_heads, -1, model.head_dim)
    return torch.cat([part.reshape(*groups, *part.shape[1:]) for part in parts], 1).flatten(0, 2)


def _split_qkv(model: ModelConfig, qkv: Tensor) -> list[Tensor]:
    heads = group_qkv(model, qkv)
    return [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]


SAME = Fusion(lambda _, parts: parts[0], lambda _, ours: [ours])
TRANSPOSED = Fusion(lambda _, parts: parts[0].t(), lambda _, ours: [ours.t()])
STACKED = Fusion(lambda _, parts: torch.cat(list(parts)), lambda _, ours: ours.chunk(2))
QKV = Fusion(_join_qkv, _split_qkv)
# GPT-2's Conv1D: [h, 3 h], queries before keys before values.
QKV_TRANSPOSED = Fusion(
    lambda model, parts: _join_qkv(model, parts[0].t().chunk(3)),
    lambda model, ours: [torch.cat(_split_qkv(model, ours)).t()],
)
QKV_BIAS = Fusion(
    lambda model, parts: _join_qkv(model, parts[0].chunk(3)),
    lambda model, ours: [torch.cat(_split_qkv(model, ours))],
)


def _row(ours: str, *theirs: str, fusion: Fusion = SAME) -> Row:
    return Row(ours, theirs, fusion)


def _layer(ours: str, *theirs: str, fusion: Fusion = SAME) -> Row:
    return Row(f"layers.{{n}}.{ours}", tuple(f"model.layers.{{i}}.{x}" for x in theirs), fusion)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv")


# Llama, Mistral, Qwen2 and Qwen3: a model has the rows that its configuration asks for.
LLAMA = Table(
    (
        _row("embedding.word.weight", "model.embed_tokens.weight"),
        _layer("input_layernorm.weight", "input_layernorm.weight"),
        _layer("self_attention.linear_qkv.weight", *_qkv("weight"), fusion=QKV),
        _layer("self_attention.linear_qkv.bias", *_qkv("bias"), fusion=QKV),
        _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
        _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
        _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        _layer(
            "mlp.linear_fc1.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            fusion=STACKED,
        ),
        _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
        _row("exits.{last}.norm.weight", "model.norm.weight"),
        _row("output.weight", "lm_head.weight"),
    ),
    words="model.embed_tokens.weight",
    buffers=(".rotary_emb.inv_freq",),
)


def _gpt2_layer() -> list[Row]:
    rows = []
    for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
        for kind in ("weight", "bias"):
            rows.append(Row(f"layers.{{n}}.{ours}.{kind}", (f"h.{{i}}.{theirs}.{kind}",), SAME))
    for ours, theirs, weight, bias in (
        ("self_attention.linear_qkv", "attn.c_attn", QKV_TRANSPOSED, QKV_BIAS),
        ("self_attention.linear_proj", "attn.c_proj", TRANSPOSED, SAME),
        ("mlp.linear_fc1", "mlp.c_fc", TRANSPOSED, SAME),
        ("mlp.linear_fc2", "mlp.c_proj", TRANSPOSED, SAME),
    ):
        rows.append(Row(f"layers.{{n}}.{ours}.weight", (f"h.{{i}}.{theirs}.weight",), weight))
        rows.append(Row(f"layers.{{n}}.{ours}.bias", (f"h.{{i}}.{theirs}.bias",), bias))
    return [row._replace(theirs=tuple(f"transformer.{key}" for key in row.theirs)) for row in rows]


GPT2 = Table(
    (
        _row("embedding.word.weight", "transformer.wte.weight"),
        _row("embedding.position.weight", "transformer.wpe.weight"),
        *_gpt2_layer(),
        _row("exits.{last}.norm.weight", "transformer.ln_f.weight"),
        _row("exits.{last}.norm.bias", "transformer.ln_f.bias"),
        _row("output.weight", "lm_head.weight"),
    ),
    words="transformer.wte.weight",
    optional_prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
)


def rows_of(table: Table, config: Config) -> dict[str, Row]:
    """Return the row of every tensor of the model by its name, exits under names of their own.

    Raises KeyError for a tensor that the table does not know: the family can not say this model.
    """
    num_layers = config.model.num_layers
    known: dict[str, Row] = {}
    for row in table.rows:
        numbers = range(1, num_layers + 1) if "{n}" in row.ours else (0,)
        for n in numbers:
            fill = {"n": n, "i": n - 1, "last": num_layers}
            ours = row.ours.format(**fill)
            known[ours] = Row(ours, tuple(key.format(**fill) for key in row.theirs), row.fusion)
    known |= {name: Row(name, (OURS + name,), SAME) for name in own_tensors(config)}
    return {name: known[name] for name in tensor_shapes(config)}


def own_tensors(config: Config) -> list[str]:
    """Return the names of the tensors that early exits have for themselves."""
    own = tuple(f"exits.{boundary}." for boundary in config.exits.boundaries)
    return [name for name in tensor_shapes(config) if name.startswith(own)]


def copied_exits(rows: dict[str, Row], config: Config) -> dict[str, Row]:
    """Return the rows with the exits' tensors made from the model's own, see `copy_source`.

    Raises ConversionError for a head with a part that the model has no counterpart of.
    """
    copied = dict(rows)
    for name in own_tensors(config):
        source = copy_source(name, config)
        if source is None:
            raise ConversionError(
                f"--head {' '.join(config.exits.head)}: the model has nothing that an mlp"
                " behind a block could be copied from; leave one out here, or convert without"
                " exits and add them with 'ee-llm checkpoint add-exits'"
            )
        copied[name] = rows[source]._replace(ours=name)
    return copied
