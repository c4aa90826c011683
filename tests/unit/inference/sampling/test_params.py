"""`SamplingParams`: which values it accepts, and in which forms."""

import json

import numpy as np
import pytest

from ee_llm.errors import RequestError
from ee_llm.inference.exits.policy import resolve_policy
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.strategies import SelfSpeculation


def test_stops_may_be_single_many_or_none() -> None:
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(stop="a").stop == SamplingParams(stop=["a"]).stop == ("a",)
    assert SamplingParams(stop_token_ids=3) == SamplingParams(stop_token_ids=[3])


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", 5), ("stop", [5]), ("stop", [""]), ("stop_token_ids", 0.5), ("stop_token_ids", [-1])],
)
def test_invalid_stops_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} = "):
        SamplingParams(**{name: value})


def test_numbers_of_numpy_are_stored_as_plain_ones() -> None:
    """They are compared, sent to other ranks and written as JSON."""
    given = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_k=np.int32(5),
        top_p=np.float64(0.5),
        min_p=0,
        seed=np.uint8(3),
        max_tokens=np.int64(9),
        stop_token_ids=np.array([1, 2]),
        logprobs=np.int64(1),
    )
    plain = SamplingParams(
        n=2,
        temperature=0.5,
        top_k=5,
        top_p=0.5,
        min_p=0.0,
        seed=3,
        max_tokens=9,
        stop_token_ids=(1, 2),
        logprobs=1,
    )
    assert given == plain
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    assert SamplingParams(stop_token_ids=np.int64(3)).stop_token_ids == (3,)
    assert json.dumps(resolve_policy(np.float32(0.5), [1]).thresholds) == "[0.5]"
    draft = SelfSpeculation(np.int64(1), np.int64(2), np.float32(0.5))
    assert repr(draft) == repr(SelfSpeculation(1, 2, 0.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, True) for name in ("n", "temperature", "top_k", "seed", "max_tokens", "logprobs")],
        ("max_tokens", np.float64(5)),
        ("temperature", np.bool_(True)),
        ("temperature", 10**400),
        ("top_p", "0.5"),
        ("top_k", -2),
        ("seed", None),
        ("stop_token_ids", True),
        ("stop_token_ids", [True]),
    ],
)
def test_what_is_no_number_is_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf"{name} = "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["draft_exit", "draft_length", "draft_threshold"])
def test_a_draft_setting_that_is_no_number_is_named(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name} = True "):
        SelfSpeculation(**{name: True})


def test_a_top_k_of_minus_one_is_no_limit_as_in_vllm() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
