"""Loss and every parameter's gradient must not depend on the layout of model and batch."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from ee_llm.training.parallel import ParallelModel

NUM_SEQUENCES = 8
VOCAB = 48
LENGTH = 8

# (tensor, pipeline, data, sequence parallel)
LAYOUTS = [
    (tensor, pipeline, data, sequence)
    for tensor, pipeline, data in itertools.product((1, 2), repeat=3)
    if tensor * pipeline * data <= 4
    for sequence in ((False, True) if tensor > 1 else (False,))
]


def layout_name(layout):
    return "tp{}-pp{}-dp{}-sp{:d}".format(*layout)


# A variant is a model. It also varies `placement`, which must not change a number.
VARIANTS = {
    "llama, plain heads, own outputs": {"exits.output": "own"},
    "llama, pre-exits, shared outputs": {"exits.output": "shared", "exits.placement": "pre"},
    "llama, tied outputs": {"exits.output": "tied"},
    "llama, tied everywhere, pre": {
        "exits.output": "tied",
        "model.tie_embeddings": True,
        "exits.placement": "pre",
    },
    "llama, mlp heads": {"exits.head": ("mlp", "norm"), "exits.output": "tied"},
    "llama, block heads, pre": {
        "exits.head": ("block", "norm"),
        "exits.output": "own",
        "exits.placement": "pre",
    },
    "llama, block and mlp heads, no norm": {"exits.head": ("block", "mlp"), "exits.output": "own"},
    "gpt, mlp heads": {"model.family": "gpt", "exits.head": ("mlp", "norm")},
    "gpt, tied, full recomputation": {
        "model.family": "gpt",
        "exits.output": "tied",
        "training.recompute": "full",
    },
    "gpt, block heads, selective recomputation": {
        "model.family": "gpt",
        "exits.head": ("block", "norm"),
        "training.recompute": "selective",
    },
    "llama, mlp heads, full recomputation": {
        "exits.head": ("mlp", "norm"),
        "training.recompute": "full",
    },
    "llama, biases and norms of queries and keys, block heads": {
        "model.qkv_bias": True,
        "model.qk_norm": True,
        "model.rope_scaling": "llama3",
        "model.rope_factor": 4.0,
        "model.rope_original_length": 40,
        "exits.head": ("block", "norm"),
    },
    "dynamic weights, temperatures, resets, naive": {
        "exits.dynamic_token_weights": True,
        "exits.temperatures": (2.0, 0.5),
        "exits.deferred": False,
        "data.reset_positions": True,
    },
}
NEUTRAL = ("exits.placement", "exits.deferred", "training.recompute")


def make_config(variant: dict, layout=(1, 1, 1, False), micro_batch_size: int = 2) -> Config:
    tensor, pipeline, _, sequence = layout
    options = {
        "model.num_layers": 4,
        "model.hidden_size": 16,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 24,
        "model.vocab_size": VOCAB,
        "model.max_seq_length": LENGTH,
        "model.init_std": 0.3,
        "exits.boundaries": (1, 2),
        "exits.weights": (0.3, 0.7),
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.sequence": sequence,
        "parallel.timeout_s": 30.0,
        "training.global_batch_size": NUM_SEQUENCES,
        "training.micro_batch_size": micro_batch_size,
    }
    return load_config(None, options | variant)


def make_batches(config: Config, grid: distributed.Grid) -> list[Microbatch]:
    """Return this rank's microbatches of a batch with uneven masks and restarting positions."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (NUM_SEQUENCES, LENGTH + 1), generator=generator)
    mask = (torch.rand(NUM_SEQUENCES, LENGTH, generator=generator) < 0.6).float()
    mask[3] = 0  # a sequence without a single valid token
    positions = torch.arange(LENGTH).repeat(NUM_SEQUENCES, 1)
    if config.data.reset_positions:
        positions[1::2, 3:] -= 3
    size = config.training.micro_batch_size
    mine = [
        slice(first, first + size)
        for first in range(grid.data_rank * size, NUM_SEQUENCES, grid.data_size * size)
    ]
    return [
        Microbatch(tokens[rows, :-1], tokens[rows, 1:], mask[rows], positions[rows])
        for rows in mine
    ]


def gather_shares(model: ParallelModel) -> None:
    """Gather the gradients that a distributed optimizer has reduced to shards on data ranks."""
    grid = model.grid
    for chunk in model.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            for bucket in (b for buffer in chunk.buffers for b in buffer.buckets):
                share = bucket.grad_data.chunk(grid.data_size)[grid.data_rank].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=grid.data_group)


def unsharded_gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Return the gradients of this rank's stage by name, assembled from tensor and data ranks."""
    gather_shares(model)
    gradients = {}
    for stage in model.stages:
        for name, parameter in stage.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.main_grad
            if model.grid.tensor_size > 1 and getattr(parameter, "tensor_model_parallel", False):
                parts = [torch.empty_like(gradient) for _ in range(model.grid.tensor_size)]
                dist.all_gather(parts, gradient.contiguous(), group=model.grid.tensor_group)
                axis = parameter.partition_dim
                if ".linear_fc1." in name and model.config.model.family == "llama":
                    halves = [part.chunk(2, dim=axis) for part in parts]
                    parts = [half[i] for i in (0, 1) for half in halves]
                gradient = torch.cat(parts, dim=axis)
            gradients[name] = gradient.clone()
    return gradients


def losses_and_gradients(variant: dict, layout, micro_batch_size, dtype=torch.float64):
    config = make_config(variant, layout, micro_batch_size)
    tensor, pipeline, _, _ = layout
    grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=30)
    model = ParallelModel(config, grid, dtype)
    losses = model.forward_backward(make_batches(config, grid), step=0)
    return losses, {name: g.numpy() for name, g in unsharded_gradients(model).items()}


def _with_weights(weights, schedule, head, recompute, deferred):
    """Return losses, gradients, and by boundary whether autograd was on for the exit."""
    config = make_config(
        {
            "exits.weights": weights,
            "exits.head": head,
            "exits.output": "own",
            "exits.deferred": deferred,
            "training.recompute": recompute,
            **schedule,
        },
        (1, 2, 1, False),
    )
    grid = distributed.initialize(pipeline=2, timeout_s=30)
    model = ParallelModel(config, grid, torch.float64)
    graphs = {}
    for stage in model.stages:
        original = stage.exit_logits

        def logits(boundary, *args, original=original):
            graphs[boundary] = torch.is_grad_enabled()
            return original(boundary, *args)

        stage.exit_logits = logits
    losses = model.forward_backward(make_batches(config, grid), step=0)
    return losses, {name: g.numpy() for name, g in unsharded_gradients(model).items()}, graphs


@pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "naive"])
@pytest.mark.parametrize(
    ("head", "recompute"),
    [(("norm",), "none"), (("block", "mlp", "norm"), "full")],
    ids=["plain", "block-mlp-recomputed"],
)
def test_exit_of_weight_0_has_a_loss_and_no_graph(head, recompute, deferred):
    """Losses and other gradients are those of a vanishing weight, and its own are zero."""
    options = (head, recompute, deferred)
    tiny = run_ranks(2, _with_weights, (1e-200, 0.7), {}, *options)
    warm_up = {"exits.weight_schedule": "linear", "exits.initial_weights": (0.0, 0.7)}
    warm_up["exits.schedule_steps"] = 9
    zero = run_ranks(2, _with_weights, (0.3, 0.7), warm_up, *options)
    for (tiny_losses, expected, _), (losses, found, graphs) in zip(tiny, zero, strict=True):
        assert losses == tiny_losses
        assert all(has_graph == (boundary != 1) for boundary, has_graph in graphs.items())
        for name, gradient in found.items():
            is_of_exit = name.startswith("exits.1.")
            assert (gradient == 0).all() == is_of_exit, name
            if not is_of_exit:
                assert relative_error(*map(torch.from_numpy, (gradient, expected[name]))) < 1e-12
    assert {b for _, _, graphs in zero for b in graphs} == {1, 2, 4}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.abs().max().item() or 1.0  # the gradient of a dropped layer is 0
    return (found - expected).abs().max().item() / scale


@functools.lru_cache(maxsize=1)
def single_process(items: tuple, dtype: torch.dtype):
    """Run one rank with microbatches of two; cached, because tests of a variant run in a row."""
    return run_ranks(1, losses_and_gradients, dict(items), (1, 1, 1, False), 2, dtype)[0]


def compare(
    variant: dict,
    layout,
    micro_batch_size: int,
    dtype,
    tolerance: float,
    spread: dict | None = None,
) -> None:
    world_size = layout[0] * layout[1] * layout[2]
    # The reference has the defaults of options that must not change a number: deferred exits, no
    # recomputation.
    reference = {k: v for k, v in variant.items() if k not in NEUTRAL}
    losses, gradients = single_process(tuple(reference.items()), dtype)
    seen = set()
    for found_losses, found in run_ranks(
        world_size,
        losses_and_gradients,
        variant | (spread or {}),
        layout,
        micro_batch_size,
        dtype,
    ):
        for boundary, loss in losses.items():
            assert found_losses[boundary] == pytest.approx(loss, rel=tolerance)
        for name, gradient in found.items():
            error = relative_error(torch.from_numpy(gradient), torch.from_numpy(gradients[name]))
            assert error < tolerance, f"{name}: relative error {error:.1e}"
        seen |= set(found)
    assert seen == set(gradients)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=layout_name)
@pytest.mark.parametrize("variant", VARIANTS, scope="module")
def test_gradients_equal_the_single_process(variant, layout):
    micro_batch_size = 1 if layout[2] == 1 else 2
    compare(VARIANTS[variant], layout, micro_batch_size, torch.float64, 1e-9)


@pytest.mark.parametrize(
    "layout",
    [(2, 2, 1, True), (2, 1, 1, True), (2, 1, 1, False), (1, 2, 1, False), (1, 1, 2, False)],
    ids=layout_name,
)
def test_float32_gradients_equal_the_single_process(layout):
    compare({"exits.output": "tied"}, layout, 1, torch.float32, 1e-5)


def test_uneven_layer_split_changes_nothing():
    spread = {"parallel.layer_split": (3, 1)}
    compare({"exits.output": "tied"}, (1, 2, 2, False), 1, torch.float64, 1e-9, spread)


def test_four_stages_with_a_weight_on_all_of_them():
    variant = {
        "exits.boundaries": (1, 2, 3),
        "exits.weights": (0.1, 0.2, 0.3),
        "exits.output": "tied",
        "model.tie_embeddings": True,
    }
    compare(variant, (1, 4, 1, False), 1, torch.float64, 1e-9)
