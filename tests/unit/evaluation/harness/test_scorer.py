"""Scores of generated tokens equal what the engine reported when it generated them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ee_llm
from ee_llm import SLED, DoLa, RunError, SamplingParams
from ee_llm.checkpoint.gates import TensorsWithGates, write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.evaluation.harness import scorer as scorer_module
from ee_llm.evaluation.harness.requests import make_window, merge_windows
from ee_llm.evaluation.harness.scorer import Scorer
from ee_llm.evaluation.harness.scoring_pass import Score, Window, live_ranges
from ee_llm.inference.choices import Measure
from ee_llm.inference.execution.attention import Run
from ee_llm.inference.exits.policy import make_exit_policy, resolve_policy
from ee_llm.inference.strategies import SelfSpeculation, Strategy, resolve_strategy
from tests.unit.evaluation.models import make_config, make_tensors, reference, save
from tests.unit.inference.fuzz import RANGES
from tests.unit.inference.models import random_gates

pytestmark = pytest.mark.thorough

THRESHOLDS = {1: 0.6, 2: 0.5}
PROMPTS = [list(range(60 + 7 * n, 60 + 7 * n + length)) for n, length in enumerate((3, 1, 9, 17))]
STRATEGIES: dict[str, Any] = {
    "exact": "exact",
    "propagate": "propagate",
    "full": "full",
    "self-speculative": SelfSpeculation(draft_exit=1),
    "sled": SLED(rate=0.5),
    "sled, exits": SLED(head="exits"),
    "dola": DoLa(layers=(0, 2)),
    "dola, raw": DoLa(layers=3, head="raw"),
}
MODELS: dict[str, dict[str, Any]] = {
    "norm": {"output": "own", "temperatures": (0.3, 0.4)},
    "mlp": {"output": "own", "head": ("mlp", "norm"), "temperatures": (0.3, 0.4)},
    "block": {"output": "own", "head": ("block", "mlp", "norm"), "temperatures": (0.3, 0.4)},
    "gpt": {"family": "gpt", "output": "own", "temperatures": (0.3, 0.4)},
}


def make_scorer(
    path: Path, exits: Any, strategy: Any, dtype: torch.dtype = torch.float64
) -> Scorer:
    reader = TensorReader(path)
    config: Config = reader.config()
    name, _, contrast = resolve_strategy(strategy, config)
    policy = resolve_policy(exits, config.exits.boundaries)
    tensors = {n: t.to(dtype) for n, t in TensorsWithGates(reader).items()}
    return Scorer(config, tensors, 32, policy, name, contrast)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", MODELS)
def test_scores_equal_the_log_probabilities_of_generation(
    tmp_path: Path, model: str, strategy: str
) -> None:
    path = save(tmp_path / "run", make_config(**MODELS[model]))
    how = STRATEGIES[strategy]
    exits = THRESHOLDS if strategy in ("exact", "propagate") else "off"
    with ee_llm.LLM(path, dtype="float64", exits=exits) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=9), strategy=how)
    windows = [make_window(o.prompt_token_ids, o.token_ids, 32) for o in outputs]
    scores = list(make_scorer(path, exits, how).score(windows))
    for output, score in zip(outputs, scores, strict=True):
        assert score.exits == output.exits
        assert score.is_greedy == (True,)
        assert score.logprobs[0] == pytest.approx(sum(output.logprobs), rel=1e-9)
    if strategy in ("exact", "propagate"):
        taken = {exit for output in outputs for exit in output.exits}
        assert len(taken) > 1, "all tokens take the same exit, so the test shows little"


def scored(path: Path, windows: list[Window], strategy: str = "exact") -> list[Score]:
    exits = THRESHOLDS if strategy in ("exact", "propagate") else "off"
    return list(make_scorer(path, exits, strategy).score(windows))


@pytest.mark.parametrize("strategy", ["exact", "propagate"])
@pytest.mark.parametrize("measure", ["agreement", "shortlist", "saturation", "gate"])
def test_scores_take_the_exits_of_generation_for_every_measure(
    tmp_path: Path, measure: Measure, strategy: Strategy
) -> None:
    config = make_config(**MODELS["block"])
    path = save(tmp_path / "run", config)
    write_gates(TensorReader(path), random_gates(config))
    lowest, highest = RANGES.get(measure, (0.05, 0.9))
    exits = make_exit_policy((1, 2), [(lowest + highest) / 2], measure)
    with ee_llm.LLM(path, dtype="float64", exits=exits) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=9), strategy=strategy)
    windows = [make_window(o.prompt_token_ids, o.token_ids, 32) for o in outputs]
    for output, score in zip(
        outputs, make_scorer(path, exits, strategy).score(windows), strict=True
    ):
        assert score.exits == output.exits
        assert score.logprobs[0] == pytest.approx(sum(output.logprobs), rel=1e-9)
    assert len({exit for output in outputs for exit in output.exits}) > 1


@pytest.mark.parametrize("strategy", ["exact", "propagate", "sled"])
def test_scores_do_not_depend_on_the_size_of_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    path = save(tmp_path / "run", make_config(**MODELS["block"]))
    windows = [make_window(prompt, [5, 80, 6, 70], 32) for prompt in PROMPTS]
    whole = scored(path, windows, strategy)
    monkeypatch.setattr(scorer_module, "MAX_ROWS", 1)
    monkeypatch.setattr(scorer_module, "MAX_LOGITS", 1)
    for one, other in zip(whole, scored(path, windows, strategy), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, rel=1e-12)
        assert (one.is_greedy, one.exits) == (other.is_greedy, other.exits)


def test_full_scores_equal_the_reference(tmp_path: Path) -> None:
    """Any continuation, not only one that the model would write."""
    config = make_config(**MODELS["norm"])
    path = save(tmp_path / "run", config)
    continuation = [9, 200, 31]
    (score,) = scored(path, [make_window(PROMPTS[2], continuation, 32)], "full")
    logits = reference(config).forward(torch.tensor([*PROMPTS[2], *continuation[:-1]]))
    rows = logits[config.model.num_layers][-3:].log_softmax(-1)
    expected = sum(float(rows[i, token]) for i, token in enumerate(continuation))
    assert score.logprobs[0] == pytest.approx(expected, rel=1e-9)
    assert score.is_greedy == (rows.argmax(-1).tolist() == continuation,) == (False,)


def test_choices_that_differ_in_the_last_token_share_a_pass(tmp_path: Path) -> None:
    path = save(tmp_path / "run", make_config(**MODELS["norm"]))
    continuations = [[7, 50], [7, 51], [8, 50], [7]]
    windows = [make_window(PROMPTS[0], continuation, 32) for continuation in continuations]
    merged = merge_windows(windows)
    assert sorted(numbers for _, numbers in merged) == [[0, 1], [2], [3]]
    alone = scored(path, windows)
    for (_, numbers), score in zip(merged, scored(path, [w for w, _ in merged]), strict=True):
        for number, logprob in zip(numbers, score.logprobs, strict=True):
            assert logprob == pytest.approx(alone[number].logprobs[0], rel=1e-12)


def test_windows_are_truncated_on_the_left() -> None:
    """The last token of a continuation is a target only, so that max_length inputs remain."""
    window = make_window([1, 2, 3, 4, 5], [6, 7], 4)
    assert window == Window((3, 4, 5, 6), ((6, 7),))
    with pytest.raises(ee_llm.UserError, match="has 5 tokens. It must have 1 to max_length = 4"):
        make_window([1], [2] * 5, 4)


def test_a_log_probability_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    tensors["layers.4.input_layernorm.weight"][0] = torch.nan
    name, _, _ = resolve_strategy("full", config)
    scorer = Scorer(config, tensors, 32, resolve_policy("off", (1, 2)), name)
    with pytest.raises(RunError, match="the exit after layer 4 is not finite"):
        list(scorer.score([make_window([1, 2], [3], 32)]))


def test_live_ranges_leave_out_frozen_rows() -> None:
    runs = [Run(0, 0, 3, 0), Run(1, 5, 9, 3)]
    assert live_ranges(runs, {1, 3, 6}) == [Run(0, 0, 1, 0), Run(0, 2, 3, 2), Run(1, 6, 8, 4)]
    assert live_ranges(runs, set()) == runs
