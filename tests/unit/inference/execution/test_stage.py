"""Inference layers and exits against the reference model: unsharded, in stages and in shards."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.execution.attention import Run
from ee_llm.inference.execution.layers import Shard
from ee_llm.inference.execution.stage import (
    LayerRange,
    ModelStage,
    cache_dtype,
    check_layout,
    make_shard,
    partition_layers,
)
from tests.unit.inference.models import QWEN3, random_tensors, tiny_config
from tests.unit.inference.stages import CHUNKS, TOKENS, Ranks, block_table, stage_logits

HEADS = [
    (),
    ("norm",),
    ("mlp", "norm"),
    ("block", "norm"),
    ("block", "mlp", "norm"),
    ("mlp",),
    ("translator", "norm"),
    ("block", "mlp", "translator", "norm"),
]


def _assert_equal(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert list(found) == list(expected)
    for boundary, logits in expected.items():
        torch.testing.assert_close(found[boundary], logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("edges", CHUNKS, ids=["at once", "in chunks"])
@pytest.mark.parametrize("head", HEADS, ids="-".join)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_every_exit_gives_the_logits_of_the_reference(
    family: str, head: tuple[str, ...], edges: tuple[int, ...]
) -> None:
    config = tiny_config(family, (1, 2, 3), head, "own", temperatures=(1.0, 0.5, 2.0))
    tensors = random_tensors(config)
    expected = ReferenceModel(config, tensors, torch.float64).forward(TOKENS)
    _assert_equal(stage_logits(config, tensors, edges), expected)


@pytest.mark.parametrize(
    "model",
    [
        {"position": "learned"},
        {"num_kv_heads": 1},
        {"num_kv_heads": 4},
        {"tie_embeddings": True},
        {"rope_theta": 77.0},
        {"num_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("output", ["own", "shared", "tied"])
def test_model_options_give_the_logits_of_the_reference(
    family: str, output: str, model: dict
) -> None:
    boundaries = () if "num_layers" in model else (1, 3)
    config = tiny_config(family, boundaries, output=output, **model)
    tensors = random_tensors(config)
    expected = ReferenceModel(config, tensors, torch.float64).forward(TOKENS)
    _assert_equal(stage_logits(config, tensors), expected)


FAMILIES = [
    ("llama", {"qkv_bias": True}),
    ("llama", {"qk_norm": True}),
    ("llama", {"qk_norm": True, "position": "learned"}),
    ("llama", QWEN3 | {"head_dim": 6}),
    ("llama", {"rope_scaling": "linear", "rope_factor": 3.0}),
    ("gpt", {"gelu": "tanh"}),
]


@pytest.mark.parametrize(("family", "model"), FAMILIES, ids=str)
def test_other_families_give_the_logits_of_the_reference(family: str, model: dict) -> None:
    config = tiny_config(family, (1, 3), ("block", "mlp", "norm"), "own", **model)
    tensors = random_tensors(config)
    expected = ReferenceModel(config, tensors, torch.float64).forward(TOKENS)
    _assert_equal(stage_logits(config, tensors), expected)
    _assert_equal(stage_logits(config, tensors, num_stages=3), expected)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("head", [("mlp", "norm"), ("block", "mlp", "norm")], ids="-".join)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_pipeline_stages_give_the_logits_of_one_stage(
    family: str, head: tuple[str, ...], num_stages: int
) -> None:
    config = tiny_config(family, (1, 3), head)
    tensors = random_tensors(config)
    expected = stage_logits(config, tensors)
    _assert_equal(stage_logits(config, tensors, num_stages=num_stages), expected)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("head", [("mlp", "norm"), ("block", "mlp", "norm")], ids="-".join)
@pytest.mark.parametrize(
    ("family", "model"),
    [("llama", {}), ("gpt", {}), ("llama", QWEN3)],
    ids=["llama", "gpt", "qwen"],
)
def test_tensor_parallel_shards_give_the_logits_of_one_rank(
    family: str, model: dict, head: tuple[str, ...], size: int
) -> None:
    """Each rank has its share of heads, widths and vocabulary; the logits are concatenated."""
    model = model | {"num_kv_heads": 4 if size == 4 else 2}
    config = tiny_config(family, (1, 3), head, "own", **model)
    tensors = random_tensors(config)
    shards = Ranks(size).run(lambda shard: stage_logits(config, tensors, shard=shard))
    expected = stage_logits(config, tensors)
    assert shards[0][1].shape == (21, 40 // size)
    logits = {b: torch.cat([part[b] for part in shards], dim=-1) for b in shards[0]}
    _assert_equal(logits, expected)


@pytest.mark.parametrize("head", [("mlp", "norm"), ("block", "mlp", "norm")], ids="-".join)
def test_logits_of_any_subset_of_rows(head: tuple[str, ...]) -> None:
    config = tiny_config("gpt", (2,), head)
    (layer_ranges,) = partition_layers(config)
    stage, table = ModelStage(config, random_tensors(config), 48, layer_ranges), block_table()
    rows = [Run(0, 0, 12, 0)]
    batch = table.batch(rows, None, torch.float64)
    hidden = stage.run(0, stage.embed(TOKENS[:12], batch.positions), batch)

    def logits(*runs: Run) -> Tensor:
        live = table.batch(rows, runs, torch.float64) if stage.has_block(0) else None
        return stage.logits(0, hidden, runs, live)

    subset = logits(Run(0, 3, 5, 3), Run(0, 11, 12, 11))
    torch.testing.assert_close(subset, logits(*rows)[[3, 4, 11]], rtol=0, atol=1e-12)
    assert logits().shape == (0, 40)


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_frozen_rows_keep_their_state_but_write_keys_and_values(family: str) -> None:
    config = tiny_config(family, head=("mlp", "norm"))
    tensors = random_tensors(config)
    exits = [4, 1, 2, 4, 1, 1, 4, 2, 4]
    model = ReferenceModel(config, tensors, torch.float64)
    expected = {b: model.logits(b, hidden) for b, hidden in model.walk(TOKENS[:9], exits)}
    (layer_ranges,) = partition_layers(config)
    stage, table = ModelStage(config, tensors, 48, layer_ranges), block_table()
    rows = [Run(0, 0, 9, 0)]
    x = stage.embed(TOKENS[:9], torch.arange(9))
    for index, layer_range in enumerate(layer_ranges):
        last = layer_range.last
        live = [Run(0, row, row + 1, row) for row, exit in enumerate(exits) if exit >= last]
        before = x.clone()
        hidden = stage.run(index, x, table.batch(rows, live, torch.float64))
        x = hidden.x
        frozen = [row for row, exit in enumerate(exits) if exit < last]
        assert torch.equal(x[frozen], before[frozen])
        numbers = [run.first for run in live]
        found = stage.logits(index, hidden, live, None)
        torch.testing.assert_close(found, expected[last][numbers], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_lower_precision_is_close(family: str, dtype: torch.dtype, atol: float) -> None:
    """The reference has the same rounded weights. A bfloat16 model has a float32 cache on a CPU."""
    config = tiny_config(family, head=("block", "norm"))
    rounded = {name: tensor.to(dtype) for name, tensor in random_tensors(config).items()}
    expected = ReferenceModel(config, rounded, torch.float64).forward(TOKENS)
    for boundary, logits in stage_logits(config, rounded).items():
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.double(), expected[boundary], rtol=0, atol=atol)
    assert cache_dtype(dtype, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("boundaries", "num_stages", "layer_ranges"),
    [
        ((1, 2), 1, [[(1, 1, True), (2, 2, True), (3, 4, True)]]),
        ((), 1, [[(1, 4, True)]]),
        ((1, 2), 2, [[(1, 1, True), (2, 2, True)], [(3, 4, True)]]),
        ((3,), 2, [[(1, 2, False)], [(3, 3, True), (4, 4, True)]]),
        ((2,), 3, [[(1, 2, True)], [(3, 3, False)], [(4, 4, True)]]),
        ((2,), 4, [[(1, 1, False)], [(2, 2, True)], [(3, 3, False)], [(4, 4, True)]]),
    ],
)
def test_layer_ranges_end_at_stages_and_at_exits(boundaries, num_stages, layer_ranges) -> None:
    expected = [[LayerRange(*fields) for fields in stage] for stage in layer_ranges]
    assert partition_layers(tiny_config(boundaries=boundaries), num_stages) == expected


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="pipeline = 5 is more than num_layers = 4"):
        partition_layers(tiny_config(), 5)


def test_sizes_that_tensor_ranks_do_not_divide_are_refused() -> None:
    def ranks(size: int) -> SimpleNamespace:
        return SimpleNamespace(tensor_rank=1, tensor_size=size, num_stages=1, reduce=torch.neg)

    for name, size in (("num_kv_heads", 1), ("ffn_hidden_size", 45), ("vocab_size", 41)):
        with pytest.raises(ValueError, match=rf"tensor = 2 does not divide {name} = {size}\."):
            make_shard(tiny_config(**{name: size}), ranks(2))
    assert make_shard(tiny_config(), ranks(2)) == Shard(1, 2, torch.neg)
    for single in (None, ranks(1)):
        shard = make_shard(tiny_config(num_kv_heads=1), single)
        assert (shard.rank, shard.size) == (0, 1)


@pytest.mark.parametrize(
    ("sizes", "tensor", "message"),
    [
        (
            {"num_heads": 6, "num_kv_heads": 3, "hidden_size": 48, "vocab_size": 36},
            2,
            r"tensor = 2 does not divide num_kv_heads = 3\. Use tensor = 1 or 3\.",
        ),
        (
            {"num_kv_heads": 4, "ffn_hidden_size": 50},
            4,
            r"tensor = 4 does not divide ffn_hidden_size = 50\. Use tensor = 1 or 2\.",
        ),
        (
            {"num_kv_heads": 4, "vocab_size": 39},
            2,
            r"tensor = 2 does not divide vocab_size = 39\. Use tensor = 1\.",
        ),
    ],
)
def test_errors_of_layouts_list_the_choices_that_fit(
    sizes: dict[str, int], tensor: int, message: str
) -> None:
    config = tiny_config(**sizes)
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_layout(config, tensor, 1)
    for fits in map(int, re.findall(r"--tensor (\d+)", message)[1:]):
        check_layout(config, fits, 1)


def test_a_cache_larger_than_the_memory_is_refused_with_its_size() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=r"no memory for the keys and values of .* GiB"):
        ModelStage(config, random_tensors(config), 2**50, partition_layers(config)[0])
