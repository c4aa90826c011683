"""The file of costs: writing, reading, and errors."""

import json
import re
from pathlib import Path

import pytest

from ee_llm.pipeline import PieceCost
from ee_llm.pipeline.planner.costs import Pieces, read_pieces, write_pieces

GIVEN = {"layer": [1, 2, 0.5], "embedding": [0, 0.1], "exit": [3, 4, 2], "final": [5, 6, 3]}


def test_written_costs_are_read_back(tmp_path):
    pieces = Pieces(
        PieceCost(1 / 3, 2, 0.5), PieceCost(0, 0.1), PieceCost(3, 4, 2), PieceCost(5, 6, 3), 0.25
    )
    write_pieces(tmp_path / "costs.json", pieces)
    assert read_pieces(tmp_path / "costs.json") == pieces


def test_communication_is_optional(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(GIVEN))
    assert read_pieces(path).communication == 0
    assert read_pieces(path).layer.weight == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1, 2, 1]}, "unknown key 'layers'. Did you mean 'layer'?"),
        ({"price": 1}, "unknown key 'price'. The keys are layer, embedding"),
        ({"exit": None}, "exit = null is not valid: it must be [forward, backward, weight]"),
        ({"embedding": [1]}, "embedding = [1] is not valid: it must be [forward, backward]"),
        ({"exit": [1, 2]}, "exit = [1, 2] is not valid: it must be [forward, backward, weight]"),
        ({"exit": [1, "2", 1]}, 'exit = [1, "2", 1] is not valid'),
        ({"final": [True, 2, 1]}, "final = [true, 2, 1] is not valid"),
        ({"final": [1, 2, 2.5]}, "final: weight = 2.5 exceeds backward = 2"),
        ({"exit": [1, -2, 0]}, "exit: backward = -2 is not valid"),
        ({"layer": [1, float("nan"), 0]}, "layer: backward = nan is not valid"),
        ({"layer": [1, 2, 3]}, "layer: weight = 3 exceeds backward = 2"),
        ({"layer": [0, 2, 1]}, "layer: forward and backward must be above 0"),
        ({"communication": -1}, "communication = -1 is not valid"),
        (
            {"communication": [1]},
            "communication = [1] is not valid: it must be a number of seconds",
        ),
    ],
)
def test_errors_name_file_and_key(tmp_path, change, message):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(GIVEN | change))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        read_pieces(path)


def test_example_of_the_documentation_is_valid(tmp_path):
    page = (Path(__file__).parents[4] / "docs" / "how-to" / "plan.md").read_text()
    path = tmp_path / "costs.json"
    path.write_text(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    assert read_pieces(path).communication > 0


@pytest.mark.parametrize("key", GIVEN)
def test_error_names_a_missing_key(tmp_path, key):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({k: v for k, v in GIVEN.items() if k != key}))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {key} is missing: it must be [")):
        read_pieces(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "must be an object")])
def test_other_files_are_errors(tmp_path, text, message):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pieces(path)
    with pytest.raises(ValueError, match="no such file"):
        read_pieces(tmp_path / "other.json")
