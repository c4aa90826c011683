"""The engine on a GPU: kernels over pages, CUDA graphs, the compiler, against their plain twins."""

import pytest
import torch

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.cli.generation.verify import verify_trace
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.paged_attention import choose, plain
from ee_llm.inference.request import Request
from ee_llm.inference.scheduling.scheduler import SchedulerConfig
from tests.unit.inference.engines import one_of_each, reference
from tests.unit.inference.execution.test_attention import HEADS, PATHS, Cache, Path
from tests.unit.inference.execution.test_paged_attention import over_pages
from tests.unit.inference.models import random_tensors, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not distributed.has_cuda(), reason="there is no GPU"),
]
KERNELS = ("varlen", "flash")
LIMITS = SchedulerConfig(
    max_num_seqs=8, num_blocks=33, block_size=256, max_pending=16, max_num_batched_tokens=64
)


def _has(name: str) -> bool:
    try:
        choose(name, distributed.device(), torch.bfloat16, LIMITS.block_size)
    except ValueError:
        return False
    return True


def _engine(dtype: torch.dtype, execution: ExecutionConfig) -> Engine:
    config = tiny_config(head_dim=32)
    device = distributed.device()
    tensors = random_tensors(config)
    return Engine(
        config, tensors, dtype, LIMITS, deferral="off", device=device, execution=execution
    )


@pytest.mark.parametrize("attention", ["gather", "plain"])
def test_float64_gives_the_tokens_of_the_reference(attention: str) -> None:
    engine = _engine(torch.float64, ExecutionConfig(attention))
    config = tiny_config(head_dim=32)
    for request, made in zip(one_of_each(), engine.generate(one_of_each()), strict=True):
        assert made.tokens == reference(request, config, random_tensors(config)).tokens


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("num_kv", "per_kv"), HEADS)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_kernels_give_what_their_plain_twin_does(
    path: Path, num_kv: int, per_kv: int, name: str, by_row: bool
) -> None:
    if not _has(name):
        pytest.skip(f"attention {name} is not to be had here")
    device = distributed.device()
    cache = over_pages(Cache(path.rows, num_kv, per_kv), plain)
    cache.batch()
    paged = cache.table.batch(cache.runs, None, cache.dtype, by_row).paged
    pages = cache.pages.view(-1, paged.block_size, *cache.pages.shape[1:])
    keys, values = pages.unbind(2)
    expected = plain(cache.queries.flatten(1, 2), keys, values, paged)
    kernel = choose(name, device, torch.bfloat16, LIMITS.block_size)
    moved = [t.to(device) for t in (paged.starts, paged.lengths, paged.new_blocks)]
    there = type(paged)(*moved, paged.longest, paged.furthest, paged.block_size, kernel)
    inputs = [t.to(device, torch.bfloat16) for t in (cache.queries.flatten(1, 2), keys, values)]
    found = kernel(*inputs, there).double().cpu()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig("gather"),
        ExecutionConfig("plain"),
        ExecutionConfig("plain", graphs=True),
        ExecutionConfig("varlen"),
        ExecutionConfig("varlen", graphs=True),
        ExecutionConfig("flash"),
        ExecutionConfig("flash", graphs=True),
        ExecutionConfig("gather", compile=True),
        ExecutionConfig("plain", graphs=True, compile=True),
    ],
    ids=lambda one: f"{one.attention} {'graphs ' * one.graphs}{'compiled' * one.compile}",
)
def test_every_divergence_is_within_the_rounding_of_bfloat16(execution: ExecutionConfig) -> None:
    from ee_llm.inference.verification.certificate import tolerance

    if not (execution.attention in ("gather", "plain") or _has(execution.attention)):
        pytest.skip(f"attention {execution.attention} is not to be had here")
    config = tiny_config(head_dim=32)
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    engine = _engine(torch.bfloat16, execution)
    requests: list[Request] = one_of_each()
    for made in (*engine.generate(requests), *engine.generate(requests)):
        first = next(iter(verify_trace(model, made)), None)
        assert first is None or tolerance(torch.bfloat16).explains(first)


def test_graphs_give_what_passes_kernel_by_kernel_do() -> None:
    eager = _engine(torch.float32, ExecutionConfig("plain")).generate(one_of_each())
    replayed = _engine(torch.float32, ExecutionConfig("plain", graphs=True)).generate(one_of_each())
    for one, other in zip(eager, replayed, strict=True):
        assert (one.tokens, one.exits) == (other.tokens, other.exits)
