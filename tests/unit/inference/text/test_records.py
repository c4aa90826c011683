"""Test generations as JSON objects: round trips, and the refusal of malformed records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation
from ee_llm.inference.text.records import as_json, difference, from_record, origin, to_record

SAMPLING = SamplingParams(
    temperature=0.5,
    top_k=3,
    top_p=0.9,
    seed=2**62 + 1,
    min_p=0.1,
    repetition_penalty=1.1,
    max_tokens=9,
    stop=("end",),
    stop_token_ids=(3,),
)
POLICY = make_exit_policy((2, 4), (0.1 + 0.2, None), "margin")
REQUEST = Request("x", (1, 2), POLICY, SAMPLING)
MADE = RequestOutput(
    request_id="x",
    prompt_token_ids=(1, 2),
    token_ids=(10, 11),
    exits=(2, 8),
    confidences=(1 / 3, 0.3),
    logprobs=(-0.1, -1e-300),
    finish_reason="stop",
    policy=POLICY,
    sampling_params=SAMPLING,
    strategy="exact",
    num_layers=8,
    text="new",
    pieces=("n", "ew"),
    num_drafted=3,
    num_accepted=2,
)


def _record(**changes: Any) -> dict[str, Any]:
    made_of = origin("é\n", REQUEST, "bfloat16", "step-00000007", "0f")
    record = to_record(made_of, MADE, "x", with_pieces=True)
    return json.loads(as_json(record)) | changes


def test_records_round_trip() -> None:
    """Thresholds and confidences are exact, and so are seeds beyond the integers of a double."""
    assert from_record(_record(), "here") == (MADE, "bfloat16")


def test_a_record_is_one_ascii_line_with_everything() -> None:
    line = as_json(_record())
    assert line.isascii()
    assert "\n" not in line
    assert line.startswith('{"id": "x", ')  # which identifies a truncated line
    record = json.loads(line)
    assert (record["prompt"], record["text"], record["pieces"]) == ("é\n", "new", ["n", "ew"])
    assert record["mean_depth"] == 5.0
    assert record["num_layers"] == 8
    assert record["policy"]["thresholds"] == {"2": 0.1 + 0.2, "4": None}
    assert record["policy"]["digest"] == POLICY.digest
    params = record["sampling_params"]
    assert (params["max_tokens"], params["stop"], params["stop_token_ids"]) == (9, ["end"], [3])
    assert [record[n] for n in ("dtype", "checkpoint", "model")] == [
        "bfloat16",
        "step-00000007",
        "0f",
    ]


def test_records_of_full_and_self_speculative_have_no_exit_thresholds() -> None:
    request = Request("x", (1,), POLICY, SAMPLING, "self-speculative", SelfSpeculation(2))
    assert origin("a", request, "float32", "x", "0f")["policy"]["thresholds"] == {
        "2": None,
        "4": None,
    }


def test_difference_names_the_changed_field() -> None:
    made_of = origin("é\n", REQUEST, "bfloat16", "step-00000007", "0f")
    assert difference(_record(), made_of) is None
    assert difference(_record(dtype="float32"), made_of) == "dtype"
    assert difference(_record(eos_token_ids=[5]), made_of) == "eos_token_ids"
    other = origin(
        "é\n", Request("x", (1, 2), POLICY, SamplingParams(seed=1)), "bfloat16", "x", "0f"
    )
    assert difference(_record(), other) == "sampling_params.temperature"
    lacking = _record()
    del lacking["sampling_params"]["logprobs"]  # whose default is None
    assert difference(lacking, made_of) == "sampling_params"


@pytest.mark.parametrize("name", [*_record()["policy"]])
def test_a_policy_without_a_part_is_refused(name: str) -> None:
    policy = {key: value for key, value in _record()["policy"].items() if key != name}
    with pytest.raises(ValueError, match=f"here: 'policy.{name}'"):
        from_record(_record(policy=policy), "here")


DRAWN_BY = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@pytest.mark.parametrize("name", DRAWN_BY)
def test_sampling_without_a_part_is_refused(name: str) -> None:
    record = _record()
    del record["sampling_params"][name]
    with pytest.raises(ValueError, match=f"here: 'sampling_params.{name}' is missing"):
        from_record(record, "here")


NOT_NEEDED = {"id", "prompt", "text", "pieces", "mean_depth", "checkpoint", "model",
              "eos_token_ids", "num_drafted", "num_accepted"}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in _record() if name not in NOT_NEEDED])
def test_a_record_without_a_part_is_refused(name: str) -> None:
    record = _record()
    del record[name]
    with pytest.raises(ValueError, match=f"here: '{name}' is missing.*ee-llm generate"):
        from_record(record, "here")


ALLOWED = [
    ("top_k", -1),
    ("top_k", 10**400),
    ("max_tokens", 10**400),
    ("ignore_eos", True),
    ("stop", []),
    ("stop_token_ids", []),
]
ALLOWED += [("logprobs", None), ("stop", ["__import__('os').system('touch executed')"])]
CODE = "__import__('os').system('touch executed')"
HOSTILE = [None, True, -1, 10**400, math.nan, math.inf, "", CODE, [], [CODE], [[1]], {}]
HOSTILE += [{"__reduce__": CODE}, {"py/object": "os.system"}, "!!python/object/apply:os.system"]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("name", [name for name in _record() if name not in NOT_NEEDED])
def test_malformed_records_are_refused_and_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^here"):
        from_record(_record(**{name: value}), "here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("name", [*_record()["sampling_params"]])
def test_malformed_sampling_params_are_refused(name: str, value: object) -> None:
    sampling = _record()["sampling_params"] | {name: value}
    if (name, value) in ALLOWED:
        assert from_record(_record(sampling_params=sampling), "here")
        return
    with pytest.raises(ValueError, match="^here"):
        from_record(_record(sampling_params=sampling), "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": [2]}, "'exits' has 1 entries for 2"),
        ({"confidences": [0.5] * 3}, "'confidences' has 3 entries for 2"),
        ({"pieces": ["a"]}, "'pieces' has 1 entries for 2"),
        ({"num_drafted": 1.5}, "'num_drafted' is 1.5"),
        ({"sampling_params": _record()["sampling_params"] | {"top_k": 1.5}}, "top_k' is 1.5"),
        ({"sampling_params": _record()["sampling_params"] | {"top_p": 1.5}}, "top_p = 1.5"),
        ({"token_ids": [10, True]}, "token_ids.1' is True"),
        ({"token_ids": [10, 2**31]}, "token_ids.1' is 2147483648"),
        ({"token_ids": []}, "token_ids' is"),
        ({"logprobs": [0.5, "x"]}, "logprobs.1' is 'x'"),
        ({"confidences": [0.5, math.nan]}, "confidences.1' is nan"),
        ({"confidences": [0.5, 10**400]}, "confidences.1' is 1000"),
        ({"sampling_params": _record()["sampling_params"] | {"n": 2}}, "sampling_params.n' is 2"),
        ({"finish_reason": "bored"}, "'finish_reason' is 'bored', not one of 'eos'"),
        ({"dtype": "int8"}, "'dtype' is 'int8', not one of float32"),
        ({"policy": _record()["policy"] | {"thresholds": {"2": 0.9, "4": None}}}, "digest"),
        ({"policy": _record()["policy"] | {"thresholds": {"two": 0.9}}}, "two"),
        ({"policy": _record()["policy"] | {"measure": ["margin"]}}, "policy.measure"),
        ({"sampling_params": _record()["sampling_params"] | {"beams": 4}}, "beams"),
    ],
)
def test_errors_name_the_malformed_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^here.*{message}"):
        from_record(_record(**changes), "here")
