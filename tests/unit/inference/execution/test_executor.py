"""The tokens do not depend on how the layers are run: paged, as CUDA graphs, or compiled."""

import random
from functools import partial
from itertools import chain

import pytest
import torch
import torch._dynamo

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.engine import Engine
from ee_llm.inference.execution import cuda_graphs, linear
from ee_llm.inference.execution.executor import ExecutionConfig
from tests.unit.inference.engines import LIMITS, make_request, one_of_each, reference
from tests.unit.inference.fuzz import assert_expected, random_engine, random_traffic
from tests.unit.inference.fuzz import serve as serve_traffic
from tests.unit.inference.models import random_tensors, tiny_config

pytestmark = pytest.mark.thorough

PAGED = ExecutionConfig("plain")
GRAPHS = ExecutionConfig("plain", cuda_graphs=True)


def _engine(execution: ExecutionConfig, **options: object) -> Engine:
    config = tiny_config(**options)
    tensors = random_tensors(config)
    return Engine(config, tensors, torch.float64, LIMITS, deferral="off", execution=execution)


@pytest.mark.parametrize("execution", [PAGED, GRAPHS], ids=["paged", "graphs"])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_gets_the_tokens_of_the_reference(
    execution: ExecutionConfig, seed: int
) -> None:
    rng = random.Random(1000 + seed)
    config = tiny_config(head=rng.choice([("norm",), ("block", "norm"), ("mlp",)]))
    engine = random_engine(rng, config, seed, execution=execution)
    traffic = random_traffic(rng, config)
    model = ReferenceModel(config, random_tensors(config, seed), torch.float64)
    assert_expected(model, traffic, serve_traffic(engine, traffic))


def test_one_graph_serves_all_passes_of_its_segment_and_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 16 rows of a sequence may be pending; buckets are powers of two up to that."""
    captured: list[tuple[int, int]] = []

    class Counted(cuda_graphs.CudaGraph):
        def __init__(self, run, segment, x, batch, num_rows):
            captured.append((segment, num_rows))
            super().__init__(run, segment, x, batch, num_rows)

    monkeypatch.setattr(cuda_graphs, "CudaGraph", Counted)
    engine = _engine(GRAPHS)
    for request in (make_request("once", 5), make_request("again", 7)):
        assert engine.generate([request])[0].token_ids == reference(request).token_ids
    assert len(captured) == len(set(captured))
    assert {1, 8} <= {num_rows for _, num_rows in captured} <= {1, 2, 4, 8, 16}
    assert {segment for segment, _ in captured} == {0, 1, 2}


def test_long_prompts_run_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_ROWS", 2)
    engine = _engine(GRAPHS)
    request = make_request("long", 9)
    assert engine.generate([request])[0].token_ids == reference(request).token_ids
    graphs = engine.runner._executor._graphs._graphs
    assert max(num_rows for _, num_rows in graphs) <= 2


def test_padding_writes_only_to_the_first_block() -> None:
    """Three rows run in a bucket of four."""
    engine, eager = _engine(GRAPHS), _engine(PAGED)
    requests = [make_request(f"{n}", 3 + n) for n in range(3)]
    for output, expected in zip(engine.generate(requests), eager.generate(requests), strict=True):
        assert (output.token_ids, output.exits) == (expected.token_ids, expected.exits)
    size = engine.scheduler_config.block_size
    pages, expected_pages = (chain(*one.runner.stage._pages) for one in (engine, eager))
    for found, expected in zip(pages, expected_pages, strict=True):
        torch.testing.assert_close(found[size:], expected[size:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "execution", [ExecutionConfig("plain", compile=True), ExecutionConfig(compile=True)]
)
def test_compiled_layers_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, execution: ExecutionConfig
) -> None:
    """The layers are traced but run eagerly, since not every machine has a compiler.

    All layers share the compiled code: for one row and for several, before and after attention.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    engine = _engine(execution)
    for request, output in zip(one_of_each(), engine.generate(one_of_each()), strict=True):
        assert output.token_ids == reference(request).token_ids
    assert 2 <= counters["stats"]["unique_graphs"] <= 6
    assert not counters["graph_break"]


def test_compiled_layers_do_not_pack_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler cannot trace oneDNN's layout, which float32 weights otherwise get on a CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = tiny_config()
    tensors = random_tensors(config, dtype=torch.float32)

    def generated(execution: ExecutionConfig) -> list[tuple[int, ...]]:
        engine = Engine(config, tensors, torch.float32, LIMITS, deferral="off", execution=execution)
        return [output.token_ids for output in engine.generate(one_of_each())]

    expected = generated(ExecutionConfig())
    monkeypatch.setattr(linear, "_pack", lambda weight: pytest.fail("a weight was packed"))
    assert generated(ExecutionConfig(compile=True)) == expected


def test_cuda_graphs_need_a_paged_kernel() -> None:
    with pytest.raises(ValueError, match="cuda_graphs .* attention = 'auto'"):
        _engine(ExecutionConfig(cuda_graphs=True))
    with pytest.raises(ValueError, match="attention 'flash' needs a GPU"):
        _engine(ExecutionConfig("flash"))
