"""The file of costs: writing, reading, and errors."""

import json
import re
from pathlib import Path

import pytest

from ee_llm.config import load_config
from ee_llm.losses.curricula import depth_weights, enabled_exits
from ee_llm.pipeline import PieceCost
from ee_llm.pipeline.planner.costs import (
    NOMINAL,
    Pieces,
    computed_share,
    read_pieces,
    write_pieces,
)

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


CURRICULA = {
    "none": {},
    "rotational": {"exits.rotation_interval": 3},
    "gradual": {},
}


@pytest.mark.parametrize("curriculum", CURRICULA)
@pytest.mark.parametrize("boundaries", ["all", (1, 3), (2, 4, 5)], ids=str)
def test_exits_of_a_curriculum_have_their_mean_cost(curriculum, boundaries):
    """Training takes whole rotations, and a multiple of 2 E steps for each E of the test."""
    options = {"model.num_layers": 6, "model.hidden_size": 8, "model.num_heads": 1}
    options |= {"model.vocab_size": 8, "parallel.pipeline": 2, "training.steps": 2400}
    options |= {"exits.boundaries": boundaries, "exits.weighting": "depth"}
    options |= {"exits.curriculum": curriculum} | CURRICULA[curriculum]
    config = load_config(None, options)
    every = (*config.exits.boundaries, 6)
    arguments = (len(every), 2400, config.exits.rotation_interval)
    trained = [
        depth_weights(every, 6, 1.0, enabled_exits(curriculum, step, *arguments))
        for step in range(2400)
    ]
    shares = {b: sum(b in weights for weights in trained) / 2400 for b in every[:-1]}
    assert {b: computed_share(config, b) for b in every[:-1]} == pytest.approx(shares)
    stages = NOMINAL.costs(config).stages
    early = [cost.total for stage in stages for cost in stage.exits][:-1]
    assert early == pytest.approx(
        [share * NOMINAL.exit.total for share in shares.values() if share]
    )
