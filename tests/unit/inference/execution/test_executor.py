"""However the layers are run, the tokens are the same: over pages, from recordings, compiled."""

import random
from functools import partial

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

PAGES = ExecutionConfig("plain")
GRAPHS = ExecutionConfig("plain", graphs=True)


def _engine(execution: ExecutionConfig, **options: object) -> Engine:
    config = tiny_config(**options)
    tensors = random_tensors(config)
    return Engine(config, tensors, torch.float64, LIMITS, deferral="off", execution=execution)


@pytest.mark.parametrize("execution", [PAGES, GRAPHS], ids=["pages", "graphs"])
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


def test_one_recording_serves_all_passes_of_its_segment_and_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 16 rows of a sequence may pend: buckets are powers of two up to that."""
    made: list[tuple[int, int]] = []

    class Counted(cuda_graphs.Recording):
        def __init__(self, run, segment, x, batch, num_rows):
            made.append((segment, num_rows))
            super().__init__(run, segment, x, batch, num_rows)

    monkeypatch.setattr(cuda_graphs, "Recording", Counted)
    engine = _engine(GRAPHS)
    for request in (make_request("once", 5), make_request("again", 7)):
        assert engine.generate([request])[0].tokens == reference(request).tokens
    assert len(made) == len(set(made))
    assert {1, 8} <= {num_rows for _, num_rows in made} <= {1, 2, 4, 8, 16}
    assert {segment for segment, _ in made} == {0, 1, 2}


def test_long_prompts_run_without_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_ROWS", 2)
    engine = _engine(GRAPHS)
    request = make_request("long", 9)
    assert engine.generate([request])[0].tokens == reference(request).tokens
    recordings = engine.runner._executor._graphs._recordings
    assert max(num_rows for _, num_rows in recordings) <= 2


def test_padding_leaves_no_trace() -> None:
    """Three rows in a bucket of four write nothing but themselves outside of the first block."""
    engine, plain = _engine(GRAPHS), _engine(PAGES)
    requests = [make_request(f"{n}", 3 + n) for n in range(3)]
    for ours, theirs in zip(engine.generate(requests), plain.generate(requests), strict=True):
        assert (ours.tokens, ours.exits) == (theirs.tokens, theirs.exits)
    size = engine.scheduler_config.block_size
    for ours, theirs in zip(engine.runner.stage._pages, plain.runner.stage._pages, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one[size:], other[size:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "execution", [ExecutionConfig("plain", compile=True), ExecutionConfig(compile=True)]
)
def test_compiled_layers_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, execution: ExecutionConfig
) -> None:
    """Traced as for the device's compiler, and run without one, which not every machine has.

    All layers share what is compiled: for one row and for several, before and after attention.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    engine = _engine(execution)
    for request, made in zip(one_of_each(), engine.generate(one_of_each()), strict=True):
        assert made.tokens == reference(request).tokens
    assert 2 <= counters["stats"]["unique_graphs"] <= 6
    assert not counters["graph_break"]


def test_compiled_layers_leave_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler can not look into oneDNN's order, which float32 weights have on a CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = tiny_config()
    tensors = random_tensors(config, dtype=torch.float32)

    def made(execution: ExecutionConfig) -> list[tuple[int, ...]]:
        engine = Engine(config, tensors, torch.float32, LIMITS, deferral="off", execution=execution)
        return [one.tokens for one in engine.generate(one_of_each())]

    plain = made(ExecutionConfig())
    monkeypatch.setattr(linear, "_pack", lambda weight: pytest.fail("a weight was laid out anew"))
    assert made(ExecutionConfig(compile=True)) == plain


def test_graphs_ask_for_attention_over_pages() -> None:
    with pytest.raises(ValueError, match="graphs need attention over pages"):
        _engine(ExecutionConfig(graphs=True))
    with pytest.raises(ValueError, match="attention 'flash' needs a GPU"):
        _engine(ExecutionConfig("flash"))
