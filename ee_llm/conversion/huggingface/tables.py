"""Tables of the tensors in a checkpoint and in other software, one per family.

Conversion reads them in both directions.

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

PREFIX = "ee_llm."
"""The prefix of the key of an exit's tensor, which no other software knows."""


class Fusion(NamedTuple):
    """Joins the tensors of other software into one of a checkpoint, and splits it again."""

    join: Callable[[ModelConfig, Sequence[Tensor]], Tensor]
    split: Callable[[ModelConfig, Tensor], Sequence[Tensor]]


class Row(NamedTuple):
    """A tensor of a checkpoint, and the tensors of other software that it consists of.

    name: the name in a checkpoint.
    keys: the keys in the other software.

    In a family's table, {n} is the number of a layer counted from 1, {i} the same counted from 0,
    and {last} the number of the last layer.
    """

    name: str
    keys: tuple[str, ...]
    fusion: Fusion

    def shapes(self, model: ModelConfig, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors in the other software from that in a checkpoint."""
        joined = torch.empty(shape, device="meta")
        return [tuple(part.shape) for part in self.fusion.split(model, joined)]


class Table(NamedTuple):
    """The rows of a family.

    words: the key of the word embedding.
    output: the key of the output weight, which may be present although it is tied to `words`.
    optional_prefix: a prefix that all keys may lack.
    buffers: endings of the keys of buffers that some versions saved and nothing reads.
    """

    rows: tuple[Row, ...]
    words: str
    output: str = "lm_head.weight"
    optional_prefix: str = ""
    buffers: tuple[str, ...] = ()

    def is_buffer(self, key: str) -> bool:
        """Return whether a key is that of a buffer, which has no weights."""
        return key.endswith(self.buffers) if self.buffers else False


def _join_qkv(model: ModelConfig, parts: Sequence[Tensor]) -> Tensor:
    """Return the fused weight [g (r + 2) d, h], or bias, of queries, keys and values."""
    groups = (model.num_kv_heads, -1, model.head_dim)
    return torch.cat([part.reshape(*groups, *part.shape[1:]) for part in parts], 1).flatten(0, 2)


def _split_qkv(model: ModelConfig, qkv: Tensor) -> list[Tensor]:
    heads = group_qkv(model, qkv)
    return [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]


SAME = Fusion(lambda _, parts: parts[0], lambda _, ours: [ours])
TRANSPOSED = Fusion(lambda _, parts: parts[0].t(), lambda _, ours: [ours.t()])
STACKED = Fusion(lambda _, parts: torch.cat(list(parts)), lambda _, ours: ours.chunk(2))
QKV = Fusion(_join_qkv, _split_qkv)
# GPT-2's Conv1D [h, 3 h]: queries, keys and values.
QKV_TRANSPOSED = Fusion(
    lambda model, parts: _join_qkv(model, parts[0].t().chunk(3)),
    lambda model, ours: [torch.cat(_split_qkv(model, ours)).t()],
)
QKV_BIAS = Fusion(
    lambda model, parts: _join_qkv(model, parts[0].chunk(3)),
    lambda model, ours: [torch.cat(_split_qkv(model, ours))],
)


def _row(name: str, *keys: str, fusion: Fusion = SAME) -> Row:
    return Row(name, keys, fusion)


def _layer(name: str, *keys: str, fusion: Fusion = SAME) -> Row:
    return Row(f"layers.{{n}}.{name}", tuple(f"model.layers.{{i}}.{key}" for key in keys), fusion)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv")


# Llama, Mistral, Qwen2 and Qwen3. `rows_of` selects the rows of a configuration.
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
    for name, key in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
        for kind in ("weight", "bias"):
            rows.append(Row(f"layers.{{n}}.{name}.{kind}", (f"h.{{i}}.{key}.{kind}",), SAME))
    for name, key, weight, bias in (
        ("self_attention.linear_qkv", "attn.c_attn", QKV_TRANSPOSED, QKV_BIAS),
        ("self_attention.linear_proj", "attn.c_proj", TRANSPOSED, SAME),
        ("mlp.linear_fc1", "mlp.c_fc", TRANSPOSED, SAME),
        ("mlp.linear_fc2", "mlp.c_proj", TRANSPOSED, SAME),
    ):
        rows.append(Row(f"layers.{{n}}.{name}.weight", (f"h.{{i}}.{key}.weight",), weight))
        rows.append(Row(f"layers.{{n}}.{name}.bias", (f"h.{{i}}.{key}.bias",), bias))
    return [row._replace(keys=tuple(f"transformer.{key}" for key in row.keys)) for row in rows]


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
    """Return the row of every tensor of the model by name. Tensors of exits have `PREFIX`.

    Raises KeyError for a tensor that the table does not have, so that the family does not fit.
    """
    num_layers = config.model.num_layers
    known: dict[str, Row] = {}
    for row in table.rows:
        numbers = range(1, num_layers + 1) if "{n}" in row.name else (0,)
        for n in numbers:
            fill = {"n": n, "i": n - 1, "last": num_layers}
            name = row.name.format(**fill)
            known[name] = Row(name, tuple(key.format(**fill) for key in row.keys), row.fusion)
    known |= {name: Row(name, (PREFIX + name,), SAME) for name in own_tensors(config)}
    return {name: known[name] for name in tensor_shapes(config)}


def own_tensors(config: Config) -> list[str]:
    """Return the names of the early exits' own tensors."""
    own = tuple(f"exits.{boundary}." for boundary in config.exits.boundaries)
    return [name for name in tensor_shapes(config) if name.startswith(own)]


def copied_exits(rows: dict[str, Row], config: Config) -> dict[str, Row]:
    """Return the rows with the exits' tensors copied from the model, see `copy_source`.

    Raises ConversionError for a head with a part that has no counterpart in the model.
    """
    copied = dict(rows)
    for name in own_tensors(config):
        source = copy_source(name, config)
        if source is None:
            raise ConversionError(
                f"--head {' '.join(config.exits.head)}: {name} has no counterpart in the model."
                " Convert without exits, and add them with 'ee-llm checkpoint add-exits'."
            )
        copied[name] = rows[source]._replace(name=name)
    return copied
