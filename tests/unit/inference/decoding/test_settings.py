"""Settings of `sled` and `dola`: defaults for a model, and errors."""

import json
import math
from typing import Any

import pytest

from ee_llm.errors import RequestError
from ee_llm.inference.decoding.settings import (
    SLED,
    DoLa,
    contrast_fields,
    resolve_contrast,
)
from tests.unit.inference.models import tiny_config


def _layers(contrast: SLED | DoLa, num_layers: int = 8, **config: Any) -> tuple[int, ...]:
    found = resolve_contrast(contrast, tiny_config(num_layers=num_layers, **config)).layers
    assert isinstance(found, tuple)
    return found


def test_default_layers_of_sled() -> None:
    assert _layers(SLED()) == (1, 2, 3, 4, 5, 6, 7)
    assert _layers(SLED(layers="all")) == _layers(SLED())
    assert _layers(SLED(layers="alternate")) == (1, 3, 5, 7)
    assert _layers(SLED(variant="released")) == (0, 1, 2, 3, 4, 5, 6, 7)
    assert _layers(SLED(), num_layers=1, boundaries=()) == (0,)


def test_default_layers_of_dola_are_those_of_transformers() -> None:
    """Every other boundary of a half; with tied embeddings, the lower half starts at 2."""
    assert _layers(DoLa()) == _layers(DoLa(layers="low")) == (0, 2)
    assert _layers(DoLa(layers="high")) == (4, 6)
    assert _layers(DoLa(), tie_embeddings=True) == (2,)
    assert _layers(DoLa(), num_layers=48) == tuple(range(0, 20, 2))
    assert _layers(DoLa(layers="high"), num_layers=48) == tuple(range(28, 48, 2))
    for num_layers in (1, 2, 3):
        for tied in (False, True):
            options = {"num_layers": num_layers, "tie_embeddings": tied, "boundaries": ()}
            assert _layers(DoLa(), **options)
            assert _layers(DoLa(layers="high"), **options)


def test_exit_heads_are_read_at_all_exits() -> None:
    assert _layers(DoLa(head="exits"), boundaries=(1, 3, 6)) == (1, 3, 6)
    assert _layers(SLED(head="exits"), boundaries=(1, 3, 6)) == (1, 3, 6)
    assert _layers(SLED(head="exits", layers="alternate"), boundaries=(1, 3, 6)) == (1, 6)
    assert _layers(DoLa(head="exits", layers=3), boundaries=(1, 3, 6)) == (3,)


def test_exit_heads_are_read_in_the_half_that_is_named() -> None:
    assert _layers(DoLa(head="exits", layers="low"), boundaries=(1, 3, 4, 6)) == (1, 3)
    assert _layers(DoLa(head="exits", layers="high"), boundaries=(1, 3, 4, 6)) == (4, 6)
    with pytest.raises(
        RequestError, match=r"layers = 'low' .* below 4, but the exits are \[4, 6\]"
    ):
        _layers(DoLa(head="exits", layers="low"), boundaries=(4, 6))
    with pytest.raises(
        RequestError, match=r"layers = 'high' .* from 4 on, .* are \[3\]. Use layers"
    ):
        _layers(DoLa(head="exits", layers="high"), boundaries=(3,))


def test_default_heads() -> None:
    config = tiny_config()
    assert resolve_contrast(SLED(), config).head == "final"
    assert resolve_contrast(SLED(variant="released"), config).head == "raw"
    assert resolve_contrast(DoLa(), config).head == "final"


@pytest.mark.parametrize("contrast", [SLED(rate=2, layers=[3, 0]), DoLa(), DoLa(layers=1)])
def test_resolved_settings_stay_as_they_are_and_survive_json(contrast: SLED | DoLa) -> None:
    resolved = resolve_contrast(contrast, tiny_config())
    assert resolve_contrast(resolved, tiny_config()) == resolved
    fields = json.loads(json.dumps(contrast_fields(resolved)))
    assert type(contrast)(**fields) == resolved


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf, "1", True, 1e30])
def test_a_rate_that_is_not_positive_and_finite_is_refused(rate: Any) -> None:
    with pytest.raises(RequestError, match="sled: rate = "):
        SLED(rate=rate)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (SLED, {"tau": 0.0}, "sled: tau = 0.0"),
        (SLED, {"scale": 0}, "sled: scale = 0"),
        (SLED, {"scale": 2.0}, "sled: scale = 2.0"),
        (SLED, {"low_value": 0.0}, "sled: low_value = 0.0"),
        (SLED, {"low_value": -math.inf}, "sled: low_value = -inf"),
        (SLED, {"variant": "official"}, "variant 'official' is unknown. Use 'paper' or"),
        (SLED, {"head": "norm"}, "sled: head 'norm' is unknown. Use one of final, raw, exits"),
        (SLED, {"layers": "low"}, "sled: layers = 'low' is unknown. Use 'all' or 'alternate'"),
        (SLED, {"layers": ()}, "sled: layers is empty"),
        (DoLa, {"layers": []}, "dola: layers is empty"),
        (DoLa, {"layers": (1, 1)}, "dola: layers = .* repeats"),
        (DoLa, {"layers": (1, "high")}, "'high' must be the only value. Use 'low' or 'high', or a"),
        (DoLa, {"layers": (1, 2.5)}, "2.5 is not an integer. Use 'low' or 'high', or a list"),
        (DoLa, {"layers": 1.5}, "dola: layers = 1.5 is unknown"),
        (DoLa, {"alpha": 0.0}, "dola: alpha = 0.0 must be a number above 0 and at most 1"),
        (DoLa, {"alpha": 1.1}, "dola: alpha = 1.1 must be a number above 0 and at most 1"),
        (DoLa, {"alpha": math.nan}, "dola: alpha = nan"),
        (DoLa, {"alpha": -0.1}, "dola: alpha = -0.1"),
    ],
)
def test_wrong_settings_are_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        (SLED(layers=(1, 4)), "sled: layers = .*: 4 is not a boundary .* to 3"),
        (DoLa(layers=-1), "dola: layers = .*: -1 is not a boundary"),
        (SLED(scale=41), "sled: scale = 41 is above model.vocab_size = 40"),
        (DoLa(layers=3, head="exits"), r"dola: .* 3 is not an exit. .* use some of \[1, 2\]"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    contrast: SLED | DoLa, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        resolve_contrast(contrast, tiny_config())


def test_exit_heads_need_exits() -> None:
    with pytest.raises(RequestError, match="dola: head = 'exits' needs exits"):
        resolve_contrast(DoLa(head="exits"), tiny_config(boundaries=()))
