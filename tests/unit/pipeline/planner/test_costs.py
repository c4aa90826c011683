"""Costs of pieces as a file: what is written reads back, and what is wrong is named."""

import json
import re
from pathlib import Path

import pytest

from ee_llm.pipeline import PieceCost
from ee_llm.pipeline.planner.costs import Pieces, read_pieces, write_pieces

GIVEN = {"layer": [1, 2, 0.5], "embedding": [0, 0.1], "exit": [3, 4, 2], "final": [5, 6, 3]}


def test_a_file_reads_as_what_was_written(tmp_path):
    pieces = Pieces(
        PieceCost(1 / 3, 2, 0.5), PieceCost(0, 0.1), PieceCost(3, 4, 2), PieceCost(5, 6, 3), 0.25
    )
    write_pieces(tmp_path / "costs.json", pieces)
    assert read_pieces(tmp_path / "costs.json") == pieces


def test_communication_may_be_left_out(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(GIVEN))
    assert read_pieces(path).communication == 0
    assert read_pieces(path).layer.weight == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1, 2, 1]}, "no such key: 'layers'; did you mean 'layer'?"),
        ({"price": 1}, "no such key: 'price'; the keys are layer, embedding"),
        ({"exit": None}, "exit is null: it must be [forward, backward, weight] in seconds"),
        ({"embedding": [1]}, "embedding is [1]: it must be [forward, backward] in seconds"),
        ({"exit": [1, 2]}, "exit is [1, 2]: it must be [forward, backward, weight] in seconds"),
        ({"exit": [1, "2", 1]}, 'exit is [1, "2", 1]: it must be'),
        ({"final": [True, 2, 1]}, "final is [true, 2, 1]: it must be"),
        ({"final": [1, 2, 2.5]}, "final: weight 2.5 is a part of backward 2"),
        ({"exit": [1, -2, 0]}, "exit: backward is -2: expected seconds, finite and not negative"),
        ({"layer": [1, float("nan"), 0]}, "layer: backward is nan"),
        ({"layer": [1, 2, 3]}, "layer: weight 3 is a part of backward 2"),
        ({"layer": [0, 2, 1]}, "layer: forward and backward must be above 0"),
        ({"communication": -1}, "communication is -1: expected seconds"),
        ({"communication": [1]}, "communication is [1]: it must be a number of seconds"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, change, message):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(GIVEN | change))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_pieces(path)


def test_the_documentation_shows_such_a_file(tmp_path):
    page = (Path(__file__).parents[4] / "docs" / "how-to" / "plan.md").read_text()
    path = tmp_path / "costs.json"
    path.write_text(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    assert read_pieces(path).communication > 0


@pytest.mark.parametrize("key", GIVEN)
def test_a_missing_key_is_named(tmp_path, key):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({k: v for k, v in GIVEN.items() if k != key}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {key} is missing: it must be [")):
        read_pieces(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "must be an object")])
def test_what_is_no_object_is_refused(tmp_path, text, message):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pieces(path)
    with pytest.raises(ValueError, match="no such file"):
        read_pieces(tmp_path / "other.json")
