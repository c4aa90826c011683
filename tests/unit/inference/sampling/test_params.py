"""`SamplingParams`: which values it accepts, and in which forms."""

import pytest

from ee_llm.errors import RequestError
from ee_llm.inference.sampling.params import SamplingParams


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
