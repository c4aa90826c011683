"""The order of runs, what they are compared with, and what is timed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ee_llm
from ee_llm.errors import DataError
from ee_llm.evaluation.sweep import timing
from ee_llm.evaluation.sweep.candidates import Candidate
from ee_llm.evaluation.sweep.deferrals import CandidateDeferrals
from ee_llm.evaluation.sweep.timing import Rounds, Speedup, Timing
from ee_llm.inference.engine import Engine
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.text.prompt_encoder import EncodedPrompt
from tests.unit.evaluation.sweep.places import BOUNDARIES, make_place


def test_speedup_is_that_of_medians_with_quartiles_of_rounds() -> None:
    found = Timing()
    for own, full in ((10.0, 10.0), (30.0, 10.0), (20.0, 10.0), (60.0, 20.0), (None, 5.0)):
        found.add(own, full)
    # Medians 25 and 10; the ratios 1, 3, 2 and 3 have the quartiles 1.75 and 3.
    assert found.speedup() == Speedup(2.5, 1.75, 3.0)
    assert found.tokens_per_second == 25.0


def test_quartiles_include_the_ratio_of_medians() -> None:
    found = Timing()
    found.add(10.0, 10.0)
    assert found.speedup() == Speedup(1.0, 1.0, 1.0)
    for own, full in ((10.0, 1.0), (10.0, 10.0), (100.0, 100.0)):
        found.add(own, full)
    assert found.speedup() == Speedup(1.0, 1.0, 3.25)
    assert Timing().speedup() is None
    assert Timing().tokens_per_second is None


@dataclass
class Decoder:
    """Stands for an `LLM`, its engine and the clock; a step of a batch takes `step_s` seconds.

    Attributes:
        step_s: Seconds of a step by the threshold of the policy.
        lengths: Number of generated tokens by the threshold; one in each step.
    """

    step_s: dict[float | None, float]
    lengths: dict[float | None, int] = field(default_factory=dict)
    now: float = 0.0
    running: list[Any] = field(default_factory=list)
    batches: list[tuple[float | None, list[str]]] = field(default_factory=list)

    @property
    def engine(self) -> "Decoder":
        return self

    def perf_counter(self) -> float:
        return self.now

    def make_request(self, prompt: EncodedPrompt, params: Any, *, exits: Any, strategy: Any) -> Any:
        threshold = exits.thresholds[0]
        count = params.max_tokens if params.ignore_eos else self.lengths.get(threshold, 3)
        return SimpleNamespace(id=prompt.text, threshold=threshold, left=count)

    def add(self, request: Any) -> None:
        self.running.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        first = self.running[0]
        if not self.batches or self.batches[-1] != (first.threshold, self._ids) or self._is_new:
            self.batches.append((first.threshold, self._ids))
        self.now += self.step_s[first.threshold]
        outputs = []
        for request in self.running:
            request.left -= 1
            done = SimpleNamespace(error=None) if request.left == 0 else None
            outputs.append(
                SimpleNamespace(request_id=request.id, tokens=["x"], request_output=done)
            )
        self.running = [request for request in self.running if request.left > 0]
        self._is_new = not self.running
        return outputs

    _is_new: bool = True

    @property
    def _ids(self) -> list[str]:
        return [request.id for request in self.running]


def candidate(threshold: float | None) -> Candidate:
    policy = ExitPolicy((1,), (threshold,))
    return Candidate("full" if threshold is None else "thresholds", "", policy, "exact", ())


def rounds_of(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    thresholds: list[float],
    num_prompts: int = 1,
    batch_size: int = 1,
    num_rounds: int = 2,
) -> Rounds:
    monkeypatch.setattr(timing, "time", decoder)
    prompts = [EncodedPrompt(str(number), (number,)) for number in range(num_prompts)]
    candidates = [candidate(one) for one in (None, *thresholds)]
    params = ee_llm.SamplingParams(max_tokens=20)
    return Rounds(decoder, candidates, prompts, params, batch_size, num_rounds)  # type: ignore[arg-type]


def test_runs_alternate_and_the_full_model_is_next_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = [0.1, 0.2, 0.3, 0.4, 0.5]
    decoder = Decoder({None: 1.0} | {one: one for one in thresholds})
    rounds = rounds_of(decoder, monkeypatch, thresholds)
    steps = iter(range(100))
    found = rounds.run(lambda: decoder.step_s.update({None: 1.0 + next(steps)}))
    order = [threshold for threshold, _ in decoder.batches]
    assert order[:6] == [None, *thresholds], "each candidate is run once before it is timed"
    assert order[6:] == [
        *(None, 0.1, 0.2, 0.3, 0.4, None, 0.5),
        *(None, 0.5, 0.4, 0.3, 0.2, None, 0.1),
    ]
    assert rounds.num_runs == next(steps) == 14
    # The full model gets slower with each run; its first run takes a second per token.
    assert found[0].speeds == found[0].full_speeds == [1.0, 1 / 5, 1 / 7, 1 / 12]
    assert found[1].full_speeds == [1.0, 1 / 12]
    assert found[5].full_speeds == [1 / 5, 1 / 7]
    assert found[2].speeds == pytest.approx([5.0, 5.0])


def test_time_begins_with_the_first_token_of_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder({None: 1.0, 0.5: 0.25}, {None: 3, 0.5: 5})
    found = rounds_of(decoder, monkeypatch, [0.5], num_prompts=2, batch_size=2).run(lambda: None)
    assert found[0].speeds == [2.0, 2.0]
    assert found[1].speeds == [8.0, 8.0]
    assert found[1].speedup() == Speedup(4.0, 4.0, 4.0)


def test_rounds_have_their_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder({None: 1.0, 0.5: 1.0})
    rounds = rounds_of(decoder, monkeypatch, [0.5], num_prompts=5, batch_size=2)
    found = rounds.run(lambda: None)
    runs = [ids for _, ids in decoder.batches[2:]]
    assert runs == [["0", "1"], ["2", "3"]] * 2 + [["4", "0"], ["1", "2"]] * 2
    assert sorted(found[1].outputs) == [0, 1, 2, 3, 4]


def test_pairs_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder({None: 1.0, 0.5: 0.5, 0.6: 9.0})
    rounds = rounds_of(decoder, monkeypatch, [0.6, 0.5], num_prompts=2)
    assert rounds.pairs(2, 3, lambda: None) == [2.0, 2.0, 2.0]
    assert decoder.batches[2:] == [
        *((None, ["0"]), (0.5, ["0"]), (0.5, ["1"]), (None, ["1"]), (None, ["0"]), (0.5, ["0"]))
    ]


def test_a_candidate_without_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder({None: 1.0, 0.5: 1.0}, {0.5: 1})
    rounds = rounds_of(decoder, monkeypatch, [0.5])
    full, early = rounds.run(lambda: None)
    assert (len(full.speeds), early.speeds, early.full_speeds) == (2, [], [])
    # The runs before, which are not timed, have 16 tokens; then each round has 3 and 1.
    assert decoder.now == 2 * 16 + 2 * (3 + 1)
    assert rounds.pairs(1, 2, lambda: None) == []
    assert list(early.outputs) == [0]
    with pytest.raises(DataError, match="full: nothing follows the first step"):
        rounds_of(Decoder({None: 1.0, 0.5: 1.0}, {None: 1}), monkeypatch, [0.5]).run(lambda: None)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    place = make_place(tmp_path_factory.mktemp("place"))
    with ee_llm.LLM(place / "run", dtype="float64", max_num_seqs=2) as llm:
        assert isinstance(llm.engine, Engine)
        yield llm.engine


@pytest.mark.thorough
def test_candidates_learn_their_own_exit_rates(engine: Engine) -> None:
    assert engine.deferral is not None
    deferrals = CandidateDeferrals(engine)
    start = list(engine.deferral.rates)
    for _ in range(2):
        with deferrals.of(1):
            engine.deferral.observe(0, [True] * 50)
            engine.scheduler.deferral_targets = [1, 2, 2]
    first = list(engine.deferral.rates)
    with deferrals.of(2):
        assert engine.deferral.rates == start
        assert engine.scheduler.deferral_targets == [1] * (len(BOUNDARIES) + 1)
    with deferrals.of(1):
        assert engine.deferral.rates == first != start
        assert engine.scheduler.deferral_targets == [1, 2, 2]
    deferrals.reset()
    with deferrals.of(1):
        assert engine.deferral.rates == start


@pytest.mark.thorough
def test_runs_leave_the_deferral_of_others_alone(tmp_path: Path) -> None:
    """A candidate whose tokens all exit must not change what the full model waits for."""
    place = make_place(tmp_path)
    policies = [ExitPolicy(BOUNDARIES, (one, one)) for one in (None, 0.01)]
    candidates = [Candidate("thresholds", "", one, "exact", ()) for one in policies]
    with ee_llm.LLM(place / "run", dtype="float64", max_num_seqs=2) as llm:
        params = ee_llm.SamplingParams(max_tokens=8, ignore_eos=True)
        prompts = [llm.encoder.encode_text("The"), llm.encoder.encode_text("quick")]
        rounds = Rounds(llm, candidates, prompts, params, batch_size=2, num_rounds=1)
        assert isinstance(llm.engine, Engine)
        rounds.run(lambda: None)
        rates = []
        for index in range(2):
            with rounds._deferrals.of(index):
                assert llm.engine.deferral is not None
                rates.append(llm.engine.deferral.rates[0])
                # It also forgets the tokens before the timed ones.
                assert llm.engine.deferral._arrived[0] <= 1.0 + 2 * 8
    # Both begin with a rate of 1/2; the first candidate then declines always, the second never.
    assert rates[0] > 0.9
    assert rates[1] < 0.1
