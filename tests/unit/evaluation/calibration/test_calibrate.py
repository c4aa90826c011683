"""Calibration of a checkpoint: its records, its policy file, the command and its errors."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import ee_llm
from ee_llm.cli.main import main
from ee_llm.errors import DataError, RequestError, UserError
from ee_llm.evaluation.calibration.result import CalibrationResult
from ee_llm.evaluation.reliability import calibration_error
from tests.unit.evaluation.models import make_config, save, write_data, write_texts

pytestmark = pytest.mark.thorough

TEXTS = [f"{number} The quick brown fox jumps over the lazy dog. " * 4 for number in range(60)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of the same shape, one without exits, and data."""
    path = tmp_path_factory.mktemp("place")
    for name, options in {
        "run": {"boundaries": (1, 2, 3), "output": "own"},
        "other": {"boundaries": (1, 2, 3), "output": "own", "rope_theta": 5000.0},
        "dense": {"boundaries": ()},
    }.items():
        save(path / name, make_config(**options))
    write_data(path / "data", [[*text.encode(), 256] for text in TEXTS])
    write_texts(path / "texts", TEXTS)
    return path


def calibrate(place: Path, model: str = "run", **given: Any) -> CalibrationResult:
    options: dict[str, Any] = {"data": place / "data", "seq_length": 32, "dtype": "float64"}
    options |= {"risk": 0.3, "progress": False}
    return ee_llm.calibrate(place / model, **{**options, **given})


@pytest.fixture(scope="module")
def result(place: Path) -> CalibrationResult:
    found = calibrate(place)
    assert any(threshold is not None for threshold in found.thresholds), "the test needs exits"
    return found


def test_shares_and_costs_belong_together(result: CalibrationResult) -> None:
    assert sum(result.shares) == pytest.approx(1)
    assert result.loss <= result.risk
    assert result.p_value is not None
    assert result.p_value <= result.delta
    cost, num_heads = 0.0, 0
    for share, boundary, threshold in zip(
        result.shares, (1, 2, 3, 4), (*result.thresholds, 1.0), strict=True
    ):
        num_heads += threshold is not None
        cost += share * (boundary + result.head_cost * num_heads)
    assert result.cost == pytest.approx(cost)
    assert 0 < result.saving < 1
    assert CalibrationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_generation_disagrees_as_often_as_predicted(
    place: Path, result: CalibrationResult, tmp_path: Path
) -> None:
    """Tokens of prompts from the same text take the exits that the calibration predicts."""
    result.save(tmp_path / "policy.json")
    prompts = [list(text.encode())[: 8 + number % 16] for number, text in enumerate(TEXTS)] * 4
    params = ee_llm.SamplingParams(max_tokens=1, ignore_eos=True)
    with ee_llm.LLM(place / "run", dtype="float64") as llm:
        early = llm.generate(prompts, params, exits=tmp_path / "policy.json")
        full = llm.generate(prompts, params, exits="off")
    pairs = [(a.tokens[0], b.tokens[0]) for a, b in zip(early, full, strict=True)]
    disagreement = sum(a.token_id != b.token_id for a, b in pairs) / len(pairs)
    depth = sum(a.exit for a, _ in pairs) / len(pairs)
    assert disagreement <= result.risk
    assert depth == pytest.approx(result.mean_depth, abs=0.5)


def test_a_policy_file_is_for_one_model(
    place: Path, result: CalibrationResult, tmp_path: Path
) -> None:
    path = tmp_path / "policy.json"
    result.save(path)
    content = json.loads(path.read_text())
    assert content["calibration"]["fingerprint"] == result.fingerprint
    with ee_llm.LLM(place / "run", exits=path, dtype="float64"):
        pass
    with pytest.raises(RequestError, match=f"calibrated .* fingerprint {result.fingerprint}"):
        ee_llm.LLM(place / "other", exits=path, dtype="float64")
    del content["calibration"]
    path.write_text(json.dumps(content))
    with ee_llm.LLM(place / "other", exits=path, dtype="float64"):
        pass


def test_reliability_is_that_of_all_tokens(
    place: Path, result: CalibrationResult, tmp_path: Path
) -> None:
    """The bins add up to the agreement and the confidence of an evaluation of the whole text."""
    evaluated = ee_llm.evaluate(place / "run", data=place / "data", seq_length=32, dtype="float64")
    assert len(result.reliability) == len(result.calibration_errors) == 3
    lines = repr(result).splitlines()
    for one, bins, error in zip(
        evaluated.exits, result.reliability, result.calibration_errors, strict=False
    ):
        assert sum(one.num_tokens for one in bins) == evaluated.num_tokens
        for name in ("agreement", "confidence"):
            total = sum(found.num_tokens * getattr(found, name) for found in bins)
            assert total / evaluated.num_tokens == pytest.approx(getattr(one, name))
        assert error == calibration_error(bins) != 0
        [line] = [line for line in lines if line.startswith(f"layer {one.boundary} ")]
        assert line.endswith(f"{error:.3f}")
    assert f"over all {evaluated.num_tokens:,} tokens" in repr(result)
    result.save(tmp_path / "policy.json")
    known = json.loads((tmp_path / "policy.json").read_text())["calibration"]
    assert known["calibration_errors"] == list(result.calibration_errors)
    assert "reliability" not in known, "bins would be most of the file"


def test_other_measures_have_a_reliability_without_any_exit_on(place: Path) -> None:
    found = calibrate(place, measure="entropy", risk=0.02, delta=0.1)
    assert found.thresholds == (None, None, None)
    assert found.calibration_errors != calibrate(place).calibration_errors
    assert all(error > 0 for error in found.calibration_errors)


@pytest.mark.parametrize("measure", ["entropy", "margin"])
def test_other_measures_of_confidence(place: Path, measure: str) -> None:
    found = calibrate(place, measure=measure)
    assert found.policy.measure == measure
    assert found.loss <= found.risk


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no exits": ({"model": "dense"}, "dense has no early exits to calibrate"),
    "risk": ({"risk": 1.5}, "risk = 1.5 is not between 0 and 1"),
    "delta": ({"delta": 0.0}, "delta = 0.0 is not between 0 and 1"),
    "measure": ({"measure": "doubt"}, "measure = 'doubt' is unknown. Use one of max_prob"),
    "too short": ({"risk": 0.001}, "windows, too few for risk = 0.001 with delta = 0.05"),
    "no text": ({"data": ()}, "there is no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes(place: Path, case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises((RequestError, DataError, UserError), match=message):
        calibrate(place, **given)


def test_command_writes_a_policy_file(
    place: Path, result: CalibrationResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, record = tmp_path / "policy.json", tmp_path / "result.json"
    data = ["--data", str(place / "data"), "--seq-length", "32", "--dtype", "float64"]
    outputs = ["--output", str(policy), "--json", str(record)]
    assert main(["calibrate", str(place / "run"), *data, "--risk", "0.3", *outputs]) == 0
    assert capsys.readouterr().out == f"{result}\n\nwrote {record}, {policy}\n"
    assert json.loads(record.read_text()) == result.to_dict()
    plot = ["--plot", str(tmp_path / "plot.svg")]
    assert main(["calibrate", str(place / "run"), *data, "--risk", "0.3", *plot]) == 0
    assert capsys.readouterr().out.endswith(f"\n\nwrote {tmp_path / 'plot.svg'}\n")
    picture = (tmp_path / "plot.svg").read_text()
    for boundary, error in zip(result.boundaries, result.calibration_errors, strict=True):
        assert f">exit {boundary}<" in picture
        assert f">error {error:.3f}<" in picture
    assert main(["calibrate", str(place / "run"), *data, "--plot", str(tmp_path / "a.txt")]) == 2
    assert "a.txt is not a picture. Use a name that ends in .png or" in capsys.readouterr().err
    command = ["generate", "--checkpoint", str(place / "run"), "--prompt", "The", "--json"]
    assert main([*command, "--policy", str(policy), "--max-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["calibrate", str(place / "run"), *data, "--risk", "0.3", "--output", "no/a"]) == 2
    assert "--output no/a: the folder no does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("measure", ["agreement", "shortlist", "saturation"])
def test_measures_of_several_exits_or_hidden_states(
    place: Path, measure: str, tmp_path: Path
) -> None:
    """Measures that compare exits need all of them, and generation does what was predicted."""
    found = calibrate(place, measure=measure)
    assert found.loss <= found.risk
    is_on = [threshold is not None for threshold in found.thresholds]
    if measure != "saturation":
        assert all(is_on) or not any(is_on)
    assert 1 <= found.heads <= (2 if measure == "shortlist" else 4)
    found.save(tmp_path / "policy.json")
    params = ee_llm.SamplingParams(max_tokens=1, ignore_eos=True)
    prompts = [list(text.encode())[: 8 + number % 16] for number, text in enumerate(TEXTS)]
    with ee_llm.LLM(place / "run", dtype="float64") as llm:
        outputs = llm.generate(prompts, params, exits=tmp_path / "policy.json")
        depth = sum(one.tokens[0].exit for one in outputs) / len(outputs)
        assert depth == pytest.approx(found.mean_depth, abs=0.5)
        assert llm.verify(outputs).passed


def test_perplexity_rises_by_no_more_than_stated(place: Path) -> None:
    found = calibrate(place, metric="perplexity", risk=0.5)
    assert any(threshold is not None for threshold in found.thresholds)
    assert 0 <= found.loss <= math.log(1.5)
    assert "the perplexity rises by at most 50.000%" in repr(found)
    strict = calibrate(place, metric="perplexity", risk=0.05)
    assert strict.cost >= found.cost


def test_a_task_is_lost_where_greedy_decoding_answers_wrong(place: Path, tmp_path: Path) -> None:
    """Teacher-forced losses equal those of real generations."""
    with ee_llm.LLM(place / "run", dtype="float64") as llm:
        prompts = [text[: 8 + length] for text in TEXTS for length in range(4)]
        params = ee_llm.SamplingParams(max_tokens=2, ignore_eos=True)
        outputs = llm.generate(prompts, params, exits="off")
        answers = [llm.decode(one.token_ids) for one in outputs]
        questions = [
            json.dumps({"prompt": prompt, "answer": answer if number % 3 else "no"})
            for number, (prompt, answer, one) in enumerate(
                zip(prompts, answers, outputs, strict=True)
            )
            if llm.tokenizer.encode(answer) == list(one.token_ids)
        ]
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(questions) + "\n", encoding="utf-8")
        found = calibrate(place, data=(), task=path, metric="task", risk=0.3)
        parsed = [json.loads(line) for line in questions]
        policy = found.policy
        early = llm.generate([one["prompt"] for one in parsed], params, exits=policy)
        lost = [
            one["answer"] != "no" and llm.decode(output.token_ids) != one["answer"]
            for one, output in zip(parsed, early, strict=True)
        ]
    assert "questions" in repr(found)
    right = [one for one in parsed if one["answer"] != "no"]
    assert found.final_accuracy == pytest.approx(len(right) / len(parsed))
    assert found.num_windows == len(right) - len(right) // 2
    assert found.loss == pytest.approx(sum(lost) / len(right), abs=0.3)


def test_a_task_that_the_model_cannot_do_is_refused(place: Path, tmp_path: Path) -> None:
    """Otherwise no answer could be lost, and every threshold would pass."""
    path = tmp_path / "task.jsonl"
    line = json.dumps({"prompt": "The quick", "answer": "zzz"})
    path.write_text(f"{line}\n" * 400, encoding="utf-8")
    with pytest.raises(
        DataError, match="the text has 0 questions that the final exit answers right"
    ):
        calibrate(place, data=(), task=path, metric="task")


BAD_TASKS = {
    "not JSON": ('{"prompt": "a"', "task.jsonl, line 2: expected a JSON object"),
    "no answer": ('{"prompt": "a"}', 'line 2: expected a JSON object {"prompt": "..", "answer"'),
    "a list": ("[1, 2]", "line 2: expected a JSON object"),
    "empty answer": ('{"prompt": "a", "answer": ""}', "texts that are not empty"),
    "too long": (json.dumps({"prompt": "a" * 90, "answer": "b"}), "have 91 tokens, more than the"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_task_file_that_is_not_one(place: Path, tmp_path: Path, case: str) -> None:
    line, message = BAD_TASKS[case]
    path = tmp_path / "task.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(message)):
        calibrate(place, data=(), task=path, metric="task")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "beauty"}, "metric = 'beauty' is unknown. Use one of agreement"),
        ({"metric": "task"}, "metric = 'task' needs files of questions"),
        ({"task": "a.jsonl"}, "metric = 'task' needs files of questions"),
        ({"task": "a.jsonl", "metric": "task"}, "Leave out data and text"),
        ({"task": "a.jsonl", "metric": "task", "data": ()}, "task file a.jsonl cannot be read"),
        ({"train_gate": True, "measure": "margin"}, "train_gate with measure = 'margin'"),
        ({"train_gate": True, "gate_tokens": 10}, "gate_tokens = 10 is too small"),
        ({"train_gate": True}, "all of which gate_tokens = 50,000 uses to train gates"),
        ({"train_gate": True, "num_tokens": 40_000}, "num_tokens = 40000 leaves nothing"),
    ],
)
def test_options_that_contradict_each_other(place: Path, given: Any, message: str) -> None:
    with pytest.raises((RequestError, DataError), match=message):
        calibrate(place, **given)
