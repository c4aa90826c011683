"""The engine on a GPU: paged kernels, CUDA graphs and the compiler against plain computation."""

import pytest
import torch

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution.executor import ExecutionConfig
from ee_llm.inference.execution.paged_attention import choose_kernel, plain
from ee_llm.inference.request import Request
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.verification.certificate import tolerance, verify_trace
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
        choose_kernel(name, distributed.device(), torch.bfloat16, LIMITS.block_size)
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
        assert made.token_ids == reference(request, config, random_tensors(config)).token_ids


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
    kernel = choose_kernel(name, device, torch.bfloat16, LIMITS.block_size)
    moved = [t.to(device) for t in (paged.cu_seqlens_q, paged.seqused_k, paged.block_table)]
    there = type(paged)(*moved, paged.max_seqlen_q, paged.max_seqlen_k, paged.block_size, kernel)
    inputs = [t.to(device, torch.bfloat16) for t in (cache.queries.flatten(1, 2), keys, values)]
    found = kernel(*inputs, there).double().cpu()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig("gather"),
        ExecutionConfig("plain"),
        ExecutionConfig("plain", cuda_graphs=True),
        ExecutionConfig("varlen"),
        ExecutionConfig("varlen", cuda_graphs=True),
        ExecutionConfig("flash"),
        ExecutionConfig("flash", cuda_graphs=True),
        ExecutionConfig("gather", compile=True),
        ExecutionConfig("plain", cuda_graphs=True, compile=True),
    ],
    ids=lambda one: f"{one.attention} {'graphs ' * one.cuda_graphs}{'compiled' * one.compile}",
)
def test_every_divergence_is_within_the_rounding_of_bfloat16(execution: ExecutionConfig) -> None:
    if not (execution.attention in ("gather", "plain") or _has(execution.attention)):
        pytest.skip(f"attention {execution.attention} is not to be had here")
    config = tiny_config(head_dim=32)
    model = ReferenceModel(config, random_tensors(config), torch.float64)
    engine = _engine(torch.bfloat16, execution)
    requests: list[Request] = one_of_each()
    for made in (*engine.generate(requests), *engine.generate(requests)):
        first = next(iter(verify_trace(model, made)), None)
        assert first is None or tolerance(torch.bfloat16).explains(first)


def test_cuda_graphs_give_the_outputs_of_eager_passes() -> None:
    eager = _engine(torch.float32, ExecutionConfig("plain")).generate(one_of_each())
    replayed = _engine(torch.float32, ExecutionConfig("plain", cuda_graphs=True)).generate(
        one_of_each()
    )
    for one, other in zip(eager, replayed, strict=True):
        assert (one.token_ids, one.exits) == (other.token_ids, other.exits)
