"""One test for each known pitfall of megatron-core.

Other tests of pitfalls are elsewhere: a missing psutil, untested versions and changes to the user's
torch in unit/distributed/test_megatron; step counts of the optimizer after a reload in
unit/training/test_adam and test_checkpoint (resuming is bit-identical); and that saving starts no
manager process in test_checkpoint_failures.
"""

import resource

import psutil
import pytest
import torch
import torch.distributed as dist

from ee_llm import distributed
from ee_llm.config import Config, load_config
from ee_llm.data import Microbatch
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from ee_llm.model.attention import CausalAttention
from ee_llm.model.stage import Stage
from ee_llm.training.parallel import ParallelModel, StageOnData

NUM_MICROBATCHES, LENGTH, VOCAB = 4, 8, 32


def make_config(tensor: int = 1, pipeline: int = 1, **options: object) -> Config:
    sizes = {
        "model.num_layers": 4,
        "model.hidden_size": 16,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.ffn_hidden_size": 24,
        "model.vocab_size": VOCAB,
        "model.max_seq_length": LENGTH,
        "model.init_std": 0.3,
        "exits.boundaries": (1, 2),
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.timeout_s": 20.0,
        "training.global_batch_size": NUM_MICROBATCHES,
    }
    return load_config(None, sizes | {k.replace("__", "."): v for k, v in options.items()})


def make_batches() -> list[Microbatch]:
    """Return microbatches of one sequence with different labels."""
    generator = torch.Generator().manual_seed(9)
    mask, positions = torch.ones(1, LENGTH), torch.arange(LENGTH).view(1, -1)
    batches = []
    for number in range(NUM_MICROBATCHES):
        tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=generator)
        batches.append(Microbatch(tokens, (tokens + 1 + number) % VOCAB, mask, positions))
    return batches


class LabelsOfTheLatestForward(StageOnData):
    """The pitfall: exits use the labels of the latest forward."""

    latest = 0

    def forward(self, microbatch, hidden):
        self.latest = microbatch
        return super().forward(microbatch, hidden)

    def exit_loss(self, microbatch, index, tap):
        return super().exit_loss(self.latest, index, tap)


def _losses(pipeline: int, recompute: str, kind: type[StageOnData]):
    config = make_config(pipeline=pipeline, training__recompute=recompute)
    grid = distributed.initialize(pipeline=pipeline, timeout_s=20)
    model = ParallelModel(config, grid, torch.float64)
    for stage in model._on_data.values():
        stage.__class__ = kind
    losses = model.forward_backward(make_batches(), step=0)
    norms = {n: p.main_grad.norm().item() for n, p in model.stages[0].named_parameters()}
    return losses, norms


def test_exit_labels_under_recomputation_are_those_of_the_microbatch():
    """With PP the latest forward before a backward is that of a later microbatch."""
    [(losses, norms)] = run_ranks(1, _losses, 1, "none", StageOnData)
    ranks = run_ranks(2, _losses, 2, "full", StageOnData)
    for found, _ in ranks:
        assert found == pytest.approx(losses, rel=1e-12)
    both = ranks[0][1] | ranks[1][1]
    assert both == pytest.approx(norms, rel=1e-9)
    careless, _ = run_ranks(2, _losses, 2, "full", LabelsOfTheLatestForward)[0]
    assert careless[1] != pytest.approx(losses[1], rel=1e-3), "the test would not see the trap"


def _forwards(family: str, recompute: str) -> tuple[int, int]:
    """Return how often attention and MLPs ran in a step, limited to 1 GiB of address space."""
    limit = psutil.Process().memory_info().vms + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    config = make_config(model__family=family, training__recompute=recompute)
    distributed.initialize(timeout_s=20)
    stage = Stage(config, 0, torch.float32)
    counts = {"attention": 0, "mlp": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    for name, module in stage.named_modules():
        if isinstance(module, CausalAttention):
            module.register_forward_hook(count("attention"))
        if name.endswith(".mlp"):
            module.register_forward_hook(count("mlp"))
    batch = make_batches()[0]
    hidden, _ = stage(batch.tokens, batch.positions)
    hidden.sum().backward()
    assert all(p.grad is not None for p in stage.layers.parameters())
    return counts["attention"], counts["mlp"]


@pytest.mark.parametrize(
    ("family", "recompute", "expected"),
    [
        ("llama", "none", (4, 4)),
        ("llama", "selective", (8, 8)),
        ("llama", "full", (8, 8)),
        ("gpt", "none", (4, 4)),
        ("gpt", "selective", (8, 4)),
        ("gpt", "full", (8, 8)),
    ],
)
def test_recomputation_runs_the_selected_modules_and_ends(family, recompute, expected):
    """The backward of megatron-core's selective 'mlp' never ends for an MLP with biases."""
    assert run_ranks(1, _forwards, family, recompute, timeout_s=20) == [expected]


def _unsharded_parameters(tensor: int, pipeline: int, options: dict) -> dict[str, torch.Tensor]:
    config = make_config(tensor, pipeline, **options)
    grid = distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=20, seed=3)
    torch.manual_seed(grid.rank)  # must not matter
    stage = Stage(config, grid.pipeline_rank, torch.float32)
    whole = {}
    for name, parameter in stage.named_parameters():
        value = parameter.detach()
        if tensor > 1 and getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(value) for _ in range(tensor)]
            dist.all_gather(parts, value.contiguous(), group=grid.tensor_group)
            axis = parameter.partition_dim
            if ".linear_fc1." in name and config.model.family == "llama":
                halves = [part.chunk(2, dim=axis) for part in parts]  # [gate; up] of each rank
                parts = [half[i] for i in (0, 1) for half in halves]
            value = torch.cat(parts, dim=axis)
        whole[name] = value.clone()
    return whole


@pytest.mark.parametrize(
    "options",
    [
        {"exits__output": "own", "exits__head": ("mlp", "norm")},
        {"model__family": "gpt", "exits__output": "tied", "exits__head": ("block", "norm")},
    ],
    ids=["llama", "gpt"],
)
def test_initialization_does_not_depend_on_the_layout(options):
    [expected] = run_ranks(1, _unsharded_parameters, 1, 1, options)
    matrices = [value for value in expected.values() if value.dim() > 1]
    for one in range(len(matrices)):  # every matrix has its own random stream
        for other in range(one):
            size = min(matrices[one].numel(), matrices[other].numel())
            a, b = (matrices[i].flatten()[:size] for i in (one, other))
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.5
    for tensor, pipeline in ((2, 1), (1, 2), (2, 2)):
        seen = set()
        for found in run_ranks(tensor * pipeline, _unsharded_parameters, tensor, pipeline, options):
            for name, value in found.items():
                assert torch.equal(value, expected[name]), name
            seen |= set(found)
        assert seen == set(expected)


def test_initialization_follows_the_seed():
    [one] = run_ranks(1, _unsharded_parameters, 1, 1, {})
    [other] = run_ranks(1, _unsharded_parameters, 1, 1, {"training__seed": 5})
    assert not torch.equal(
        one["layers.1.mlp.linear_fc1.weight"], other["layers.1.mlp.linear_fc1.weight"]
    )
    assert one["layers.1.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.3, rel=0.1)
    scaled = 0.3 / (2 * 4) ** 0.5  # weights that write to the residual stream
    assert one["layers.1.mlp.linear_fc2.weight"].std().item() == pytest.approx(scaled, rel=0.1)
