"""Generations as JSON objects and back; what is malformed is refused, and nothing of it runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.sampler import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation
from ee_llm.inference.text.records import as_json, difference, from_record, origin, to_record
from ee_llm.inference.verification.reference_decoding import RequestOutput

SAMPLING = SamplingParams(0.5, 3, 0.9, 2**62 + 1, 0.1, 1.1)
POLICY = make_exit_policy((2, 4), (0.1 + 0.2, None), "margin")
REQUEST = Request("x", (1, 2), POLICY, SAMPLING, max_new_tokens=9, stop_strings=("end",))
MADE = RequestOutput(
    prompt=(1, 2),
    tokens=(10, 11),
    exits=(2, 8),
    confidences=(1 / 3, 0.3),
    logprobs=(-0.1, -1e-300),
    finish_reason="stop",
    policy=POLICY,
    sampling=SAMPLING,
    strategy="exact",
    num_drafted=3,
    num_accepted=2,
)


def _record(**changes: Any) -> dict[str, Any]:
    made_of = origin("é\n", REQUEST, "bfloat16", "step-00000007", "0f")
    record = to_record(made_of, "new", MADE, 8, ["n", "ew"], "x")
    return json.loads(as_json(record)) | changes


def test_there_and_back_nothing_changes() -> None:
    """Thresholds and confidences keep their last bit, seeds beyond a double's integers as well."""
    assert from_record(_record(), "here") == (MADE, "bfloat16")


def test_a_record_is_one_ascii_line_with_everything() -> None:
    line = as_json(_record())
    assert line.isascii()
    assert "\n" not in line
    assert line.startswith('{"id": "x", ')  # by which a line cut off is known
    record = json.loads(line)
    assert (record["prompt"], record["text"], record["pieces"]) == ("é\n", "new", ["n", "ew"])
    assert record["mean_depth"] == 5.0
    assert record["num_layers"] == 8
    assert record["policy"]["thresholds"] == {"2": 0.1 + 0.2, "4": None}
    assert record["policy"]["digest"] == POLICY.digest
    assert (record["max_new_tokens"], record["stop"]) == (9, ["end"])
    assert [record[n] for n in ("dtype", "checkpoint", "model")] == [
        "bfloat16",
        "step-00000007",
        "0f",
    ]


def test_full_and_verify_have_no_exit_in_force() -> None:
    request = Request("x", (1,), POLICY, SAMPLING, "self-speculative", SelfSpeculation(2))
    assert origin("a", request, "float32", "x", "0f")["policy"]["thresholds"] == {
        "2": None,
        "4": None,
    }


def test_a_difference_of_origin_is_named() -> None:
    made_of = origin("é\n", REQUEST, "bfloat16", "step-00000007", "0f")
    assert difference(_record(), made_of) is None
    assert difference(_record(dtype="float32"), made_of) == "dtype"
    assert difference(_record(stop=[]), made_of) == "stop"
    other = origin(
        "é\n", Request("x", (1, 2), POLICY, SamplingParams(seed=1)), "bfloat16", "x", "0f"
    )
    assert difference(_record(), other) == "sampling"


@pytest.mark.parametrize("name", [*_record()["policy"]])
def test_a_policy_without_a_part_is_refused(name: str) -> None:
    policy = {key: value for key, value in _record()["policy"].items() if key != name}
    with pytest.raises(ValueError, match=f"here has no '{name}'"):
        from_record(_record(policy=policy), "here")


NOT_NEEDED = {"id", "prompt", "text", "pieces", "mean_depth", "num_layers", "checkpoint", "model",
              "max_new_tokens", "stop", "eos_token_ids", "stop_token_ids"}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in _record() if name not in NOT_NEEDED])
def test_a_record_without_a_part_is_refused(name: str) -> None:
    record = _record()
    del record[name]
    with pytest.raises(ValueError, match=f"here has no '{name}': is it from 'ee-llm generate'"):
        from_record(record, "here")


CODE = "__import__('os').system('touch executed')"
HOSTILE = [None, True, -1, 10**400, math.nan, math.inf, "", CODE, [], [CODE], [[1]], {}]
HOSTILE += [{"__reduce__": CODE}, {"py/object": "os.system"}, "!!python/object/apply:os.system"]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("name", [name for name in _record() if name not in NOT_NEEDED])
def test_nothing_malformed_is_taken_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^here"):
        from_record(_record(**{name: value}), "here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("name", [*_record()["sampling"]])
def test_no_malformed_sampling_is_taken(name: str, value: object) -> None:
    sampling = _record()["sampling"] | {name: value}
    if (name, value) == ("top_k", 10**400):
        assert from_record(_record(sampling=sampling), "here")  # as many as there are
        return
    with pytest.raises(ValueError, match="^here"):
        from_record(_record(sampling=sampling), "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": [2]}, "'exits' has 1 entries, not 2"),
        ({"confidences": [0.5] * 3}, "'confidences' has 3 entries, not 2"),
        ({"num_drafted": 1.5}, "'num_drafted' is 1.5, no count"),
        ({"sampling": _record()["sampling"] | {"top_k": 1.5}}, "'top_k' is 1.5"),
        ({"tokens": [10, True]}, "'tokens' has others than whole numbers"),
        ({"tokens": [10, 2**31]}, "'tokens' has others than whole numbers"),
        ({"logprobs": [0.5, "x"]}, "'logprobs' has others than numbers"),
        ({"confidences": [0.5, 10**400]}, "is no generation"),
        ({"finish_reason": "bored"}, "'finish_reason' is 'bored', none of eos"),
        ({"dtype": "int8"}, "'dtype' is 'int8', none of float32"),
        ({"policy": _record()["policy"] | {"thresholds": {"2": 0.9, "4": None}}}, "digest is"),
        ({"policy": _record()["policy"] | {"thresholds": {"two": 0.9}}}, "two"),
        ({"policy": _record()["policy"] | {"measure": ["margin"]}}, "is no generation"),
        ({"sampling": _record()["sampling"] | {"beams": 4}}, "beams"),
    ],
)
def test_what_is_malformed_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here.*{message}"):
        from_record(_record(**changes), "here")
