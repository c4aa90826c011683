"""The layers and heads of tokens against the passes that the engine runs."""

from collections.abc import Iterator

import pytest

import ee_llm
from ee_llm.evaluation.sweep.work import Work, work_of
from ee_llm.inference.execution.runner import Runner
from ee_llm.inference.scheduling.output import SchedulerOutput
from ee_llm.inference.strategies import SelfSpeculation, Strategy
from tests.unit.evaluation.sweep.places import BOUNDARIES, NUM_LAYERS, make_place

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ee_llm.LLM]:
    place = make_place(tmp_path_factory.mktemp("place"))
    with ee_llm.LLM(place / "run", dtype="float64", max_num_seqs=1) as llm:
        yield llm


CASES: dict[str, tuple[dict[int, float], Strategy | SelfSpeculation]] = {
    "full": ({}, "full"),
    "one exit": ({4: 0.2}, "exact"),
    "both exits": ({2: 0.3, 4: 0.2}, "exact"),
    "rarely": ({2: 0.9, 4: 0.9}, "exact"),
    "propagate": ({2: 0.25, 4: 0.25}, "propagate"),
    "draft": ({}, SelfSpeculation(2, 3)),
    "deep draft": ({}, SelfSpeculation(4, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_work_equals_the_passes_of_the_engine(
    llm: ee_llm.LLM, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    exits, strategy = CASES[case]
    passes: list[SchedulerOutput] = []
    run = Runner.run

    def record(self: Runner, output: SchedulerOutput) -> object:
        passes.append(output)
        return run(self, output)

    monkeypatch.setattr(Runner, "run", record)
    params = ee_llm.SamplingParams(max_tokens=24, ignore_eos=True)
    outputs = llm.generate("The quick", params, exits=exits or "off", strategy=strategy)
    work = work_of(outputs, strategy, BOUNDARIES)
    ends = (0, *BOUNDARIES, NUM_LAYERS)
    layers = [ends[step.segment + 1] - ends[step.segment] for one in passes for step in one.steps]
    # The last draft of a cycle passes the exit's layers together with the deep pass, or before it.
    num_tokens = len(outputs[0].token_ids)
    assert work.heads * num_tokens == pytest.approx(sum(bool(one.logit_rows) for one in passes))
    assert work.layers * num_tokens == pytest.approx(sum(layers))
    is_last = [step.segment == len(BOUNDARIES) for one in passes for step in one.steps[-1:]]
    assert work.final_heads * num_tokens == pytest.approx(sum(is_last))
    assert sum(work.shares) == pytest.approx(1.0)
    if strategy in ("exact", "propagate") and case != "rarely":
        assert 0 < work.shares[-1] < 1, "the test would not notice wrong depths"


def test_ideal_speedup_counts_heads() -> None:
    """A token of half of the layers with two heads, against all layers with one."""
    work = Work(4.0, 2.0, 0.5, (0.5, 0.5))
    assert work.ideal_speedup(8, 0.0, 0.0) == 2.0
    assert work.ideal_speedup(8, 2.0, 2.0) == 10 / 8
    assert work.ideal_speedup(8, 2.0, 1.0) == 9 / (4 + 3 + 0.5)
    assert Work(8.0, 1.0, 1.0, (0.0, 1.0)).ideal_speedup(8, 2.0, 1.0) == 1.0
