"""A whole sweep of a small model: quality by hand, batches, and refused input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ee_llm
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.checkpoint.gates import fingerprint_with_gates, write_gates
from ee_llm.checkpoint.read import TensorReader
from ee_llm.errors import DataError, RequestError, UserError
from ee_llm.evaluation.sweep.confirm import is_faster
from ee_llm.evaluation.sweep.result import SweepResult
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.evaluation.models import EOS, make_config, make_tensors
from tests.unit.evaluation.sweep.places import (
    NUM_LAYERS,
    PROMPTS,
    agreeing_config,
    agreeing_tensors,
    make_place,
)
from tests.unit.inference.models import random_gates, save_model

pytestmark = pytest.mark.thorough

NUM_NEW = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


def sweep(place: Path, model: str = "run", **given: Any) -> SweepResult:
    options: dict[str, Any] = {
        "max_tokens": NUM_NEW,
        "ignore_eos": True,
        "thresholds": (0.15, 0.3),
        "draft_lengths": (3,),
        "rounds": 2,
        "dtype": "float64",
        "progress": False,
    }
    sources = {"prompts", "data", "text"}
    if not sources & given.keys():
        options["prompts"] = list(PROMPTS)
    return ee_llm.sweep(place / model, **{**options, **given})


@pytest.fixture(scope="module")
def result(place: Path) -> SweepResult:
    return sweep(place)


def test_quality_equals_that_by_hand(place: Path, result: SweepResult) -> None:
    config = agreeing_config()
    model = ReferenceModel(config, agreeing_tensors(config), torch.float64)
    params = ee_llm.SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    strategies: dict[str, tuple[Any, Any]] = {
        "full": ("off", "full"),
        "exit 2 at 0.15": ({2: 0.15}, "exact"),
        "exits 2+4 at 0.3": ({2: 0.3, 4: 0.3}, "exact"),
        "draft 3 at exit 4": ("off", SelfSpeculation(4, 3)),
    }
    points = {point.name: point for point in result.points}
    with ee_llm.LLM(place / "run", dtype="float64") as llm:
        for name, (exits, strategy) in strategies.items():
            outputs = llm.generate(list(PROMPTS), params, exits=exits, strategy=strategy)
            agreeing, loss = 0, 0.0
            for output in outputs:
                tokens = torch.tensor([*output.prompt_token_ids, *output.token_ids])
                rows = model.forward(tokens[:-1])[NUM_LAYERS][-NUM_NEW:].log_softmax(-1)
                agreeing += int((rows.argmax(-1) == tokens[-NUM_NEW:]).sum())
                loss -= float(rows.gather(-1, tokens[-NUM_NEW:, None]).sum())
            count = NUM_NEW * len(PROMPTS)
            assert points[name].num_tokens == count
            assert points[name].agreement == pytest.approx(agreeing / count)
            assert points[name].loss == pytest.approx(loss / count)
            if name.startswith("exit"):
                mean = sum(output.mean_depth for output in outputs) / len(outputs)
                assert points[name].layers == pytest.approx(mean)
    assert points["exit 2 at 0.15"].agreement < 1.0, "the test would not notice wrong tokens"


def test_full_depth_agrees_and_its_speed_is_the_unit(result: SweepResult) -> None:
    lossless = [one for one in result.points if one.family in ("full", "self-speculative")]
    assert len(lossless) == 3
    assert all(one.agreement == 1.0 for one in lossless)
    assert all(one.loss == pytest.approx(result.full.loss) for one in lossless)
    assert all(one.acceptance is not None and 0 < one.acceptance < 1 for one in lossless[1:])
    assert (result.full.speedup, result.full.layers, result.full.heads) == (1.0, NUM_LAYERS, 1.0)
    for one in result.points:
        assert one.tokens_per_second is not None
        assert one.tokens_per_second > 0
        assert one.speedup_low <= one.speedup <= one.speedup_high  # type: ignore[operator]


def test_many_layers_cost_time(result: SweepResult) -> None:
    """A token that stops after a quarter of the layers is faster than one that does not."""
    points = {point.name: point for point in result.points}
    low = points["exit 2 at 0.15"]
    assert low.ideal_speedup > points["exit 2 at 0.3"].ideal_speedup
    assert low.layers < points["exit 2 at 0.3"].layers < NUM_LAYERS


@pytest.mark.parametrize("batch_size", [3, 4])
def test_quality_does_not_depend_on_the_batch_size(
    place: Path, result: SweepResult, batch_size: int
) -> None:
    batched = sweep(place, batch_size=batch_size)
    for one, other in zip(batched.points, result.points, strict=True):
        assert (one.name, one.num_tokens) == (other.name, other.num_tokens)
        assert one.agreement == other.agreement
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
        assert one.layers == pytest.approx(other.layers)


def test_prompts_of_a_file_equal_given_ones(place: Path, result: SweepResult) -> None:
    found = sweep(place, prompts=place / "prompts.jsonl", families=["self-speculative"])
    assert found.inputs == (str(place / "prompts.jsonl"),)
    assert found.full.loss == result.full.loss


def test_prompts_of_prepared_data_and_policy_files(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    ee_llm.ExitPolicy((2, 4), (None, 0.2)).save(path)
    found = sweep(
        place, data=place / "data", num_prompts=3, prompt_length=5, policy=path, families=[]
    )
    assert [point.name for point in found.points] == ["full", "policy policy.json"]
    assert found.points[1].thresholds == (None, 0.2)
    assert (found.num_prompts, found.full.num_tokens) == (3, 3 * NUM_NEW)
    texts = sweep(
        place, text=place / "texts", num_prompts=3, prompt_length=5, families=[], policy=path
    )
    assert texts.full.num_tokens == 3 * NUM_NEW


def test_single_values_need_no_list(place: Path) -> None:
    found = sweep(
        place,
        families="thresholds",
        exits="all",
        thresholds=0.3,
        draft_exits=2,
        draft_lengths=2,
        rounds=1,
    )
    assert [point.name for point in found.points] == ["full", "exits 2+4 at 0.3"]
    assert [point.strategy for point in found.points] == ["full", "exact"]
    drafts = sweep(place, families="self-speculative", draft_exits=2, draft_lengths=2, rounds=1)
    assert [point.name for point in drafts.points] == ["full", "draft 2 at exit 2"]
    assert drafts.points[1].strategy == "self-speculative"
    with pytest.raises(RequestError, match="there is nothing to measure: families"):
        sweep(place, families=None)


def test_the_fingerprint_covers_gates_that_are_used(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    config = agreeing_config()
    write_gates(TensorReader(tmp_path / "run"), random_gates(config))
    given: dict[str, Any] = {"families": "thresholds", "thresholds": 0.5, "rounds": 1}
    with_gates = sweep(tmp_path, measure="gate", **given)
    assert with_gates.fingerprint == fingerprint_with_gates(TensorReader(tmp_path / "run"))
    without = sweep(tmp_path, **given)
    assert without.fingerprint == sweep(place, **given).fingerprint != with_gates.fingerprint


def test_result_survives_json(result: SweepResult) -> None:
    assert SweepResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_generations_that_end_at_once_are_named(tmp_path: Path) -> None:
    """There would be no time to measure."""
    config = make_config("gpt")
    tensors = make_tensors(config)
    tensors["exits.4.norm.bias"][:] = tensors["output.weight"][EOS] = 10.0
    save_model(tmp_path / "run", config, tensors)
    with pytest.raises(DataError, match="full: nothing follows the first step of any generation"):
        sweep(tmp_path, ignore_eos=False)
    assert sweep(tmp_path, families=["self-speculative"]).full.num_tokens == 6 * NUM_NEW


def test_a_point_without_time_does_not_end_the_sweep(tmp_path: Path) -> None:
    """The drafts of the first step are all right, so that no token is left for another."""
    config = agreeing_config()
    tensors = agreeing_tensors(config)
    for name, tensor in tensors.items():
        if name.startswith("layers.") and int(name.split(".")[1]) > 2:
            tensor.zero_()
    save_model(tmp_path / "run", config, tensors)
    found = sweep(
        tmp_path,
        max_tokens=3,
        draft_lengths=(4, 1),
        draft_exits=(2,),
        families=("self-speculative",),
    )
    perfect, short = found.points[1:]
    assert (perfect.name, perfect.acceptance) == ("draft 4 at exit 2", 1.0)
    assert (perfect.speedup, perfect.speedup_low, perfect.tokens_per_second) == (None, None, None)
    assert short.speedup is not None
    assert found.recommended is not perfect
    assert "not timed" in repr(found)


REFUSED: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "no prompts": ({"prompts": []}, RequestError, "there are no prompts. Give one of these"),
    "both": ({"prompts": ["a"], "data": "d"}, RequestError, "prompts and data are both given"),
    "empty prompt": ({"prompts": ["a", ""]}, RequestError, r"prompts\[1\] is ''. Give a text"),
    "no file": ({"prompts": Path("gone.jsonl")}, RequestError, r"gone\.jsonl cannot be read"),
    "threshold": ({"thresholds": (0.9, 1.5)}, RequestError, r"thresholds = 1.5 is not in \(0, 1\]"),
    "NaN": ({"thresholds": (float("nan"),)}, RequestError, r"thresholds = nan is not in \(0, 1\]"),
    "agreement": ({"min_agreement": 0.0}, RequestError, r"min_agreement = 0.0 is not in \(0, 1\]"),
    "no rounds": ({"rounds": 0}, RequestError, "rounds = 0 is out of range. Use 1 to"),
    "one token": ({"max_tokens": 1}, RequestError, "max_tokens = 1 is out of range. Use 2 to"),
    "length": ({"draft_lengths": (0,)}, RequestError, "draft_lengths = 0 is out of range"),
    "family": ({"families": ("none",)}, RequestError, "families: 'none' is unknown"),
    "strategy": ({"strategy": "full"}, RequestError, "strategy = 'full' is unknown. Use one of"),
    "too long": ({"max_tokens": 60}, RequestError, r"prompt 1 has 9 tokens, .* are more than 64"),
    "batch": ({"batch_size": 7}, RequestError, "batch_size = 7 is more than the 6 prompts"),
    "surrogate": ({"prompts": ["\ud800"]}, RequestError, r"prompts\[0\] is .* Give a text"),
    "count": ({"num_prompts": 7}, RequestError, "num_prompts = 7 is more than the 6 given prompts"),
    "scale": (
        {"measure": "saturation", "thresholds": ()},
        RequestError,
        "measure = 'saturation' has no default thresholds",
    ),
    "too long text": (
        {"data": "data", "prompt_length": 60, "num_prompts": 1},
        RequestError,
        "prompt 1 has 60 tokens, .* Lower prompt_length, or lower max_tokens",
    ),
    "no exits": ({"model": "dense"}, RequestError, "has no early exits to measure. Add some with"),
    "id": ({"prompts": [[1, 900]]}, RequestError, "prompt 1 has token ids 1 to 900, outside"),
    "short": (
        {"num_prompts": 99, "data": "data"},
        DataError,
        "data is too short for num_prompts = 99 prompts of prompt_length = 64 tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(place: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(place)
    given, kind, expected = REFUSED[case]
    with pytest.raises(kind, match=expected):
        sweep(place, **given)


def test_empty_files_are_named(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(RequestError, match=r"empty\.jsonl is empty. Give one JSON object per line"):
        sweep(place, prompts=path)
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(RequestError, match='line 2: "prompt" is'):
        sweep(place, prompts=path)
    path.write_text('{"prompt": "a", "max_tokens": 7, "id": 3}\n')
    with pytest.raises(RequestError, match="line 1: 'max_tokens' is unknown. Give one of prompt,"):
        sweep(place, prompts=path)


def test_launchers_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank would measure on its own."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="cannot run under a launcher such as torchrun"):
        sweep(place)
    # A launcher with a single process is as good as none.
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RequestError, match="batch_size = 2 is more than the 1 prompts"):
        sweep(place, prompts=["a"], batch_size=2)


@pytest.mark.parametrize(
    "given",
    [
        {"strategy": "propagate", "dtype": "bfloat16", "batch_size": 3},
        {"measure": "entropy", "exits": ("2",), "thresholds": (0.3,)},
        {"measure": "agreement", "exits": ("2+4",), "thresholds": (0.05,)},
    ],
)
def test_strategies_measures_and_precisions(place: Path, given: dict[str, Any]) -> None:
    found = sweep(place, rounds=1, draft_exits=(4,), **given)
    low = found.points[1]
    assert low.measure == given.get("measure", "max_probability")
    assert 0 < low.shares[-1] < 1, "some tokens exit, and some do not"
    assert low.layers < NUM_LAYERS
    assert found.dtype == given.get("dtype", "float64")
    assert found.points[-1].family == "self-speculative"
    assert found.full.agreement > 0.9


def test_the_best_point_is_tested_in_new_runs(place: Path) -> None:
    """All tokens exit after two of eight layers."""
    given = {"exits": ("2",), "thresholds": (0.01,), "families": ("thresholds",), "rounds": 4}
    found = sweep(place, prompts=["The", "fox"], max_tokens=20, min_agreement=0.01, **given)
    full, early = found.points
    assert full.paired_speedups == ()
    # A machine that is disturbed may not see that it is faster.
    assert len(early.paired_speedups) == (10 if found.contenders else 0)
    assert found.recommended is (early if is_faster(early.paired_speedups) else full)


_PIPELINE = """
import json, sys
import ee_llm
options = {"max_tokens": 4, "ignore_eos": True, "thresholds": (0.15,), "draft_lengths": (2,)}
found = ee_llm.sweep(sys.argv[1], ["The", "fox"], pipeline=2, dtype="float64", **options)
print(json.dumps(found.to_dict()))
"""


@pytest.mark.slow
def test_pipeline_stages_generate_the_same(place: Path) -> None:
    """This runs in a new process, because a process group must contain only ranks."""
    command = [sys.executable, "-c", _PIPELINE, str(place / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = SweepResult.from_dict(json.loads(done.stdout))
    assert found.execution == ("--dtype", "float64", "--pipeline", "2")
    one = sweep(place, prompts=["The", "fox"], max_tokens=4, thresholds=(0.15,), draft_lengths=(2,))
    for left, right in zip(found.points, one.points, strict=True):
        assert (left.name, left.agreement, left.shares) == (
            right.name,
            right.agreement,
            right.shares,
        )
        assert left.loss == pytest.approx(right.loss)
