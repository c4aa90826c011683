"""Errors for LayerSkip's options: they name the options, their values and a remedy."""

from typing import Any

import pytest

from ee_llm.cli.arguments.help import CommandHelp
from ee_llm.cli.arguments.parsing import parse_values
from ee_llm.cli.run_options import config_options
from ee_llm.config import load_config
from tests.unit.refusals import assert_message, message

DEPTH = {"exits.boundaries": "all", "exits.weighting": "depth"}
ROTATION = DEPTH | {"exits.curriculum": "rotational"}
SHARED = {"exits.boundaries": (2,), "exits.norm": "shared"}
TUNING = {"tuning.checkpoint": "runs/a", "exits.boundaries": (2, 4)}

CASES = {
    "dropout of 1": (
        {"layer_dropout.max_probability": 1.0},
        "layer_dropout.max_probability: must be less than 1, got 1.0",
    ),
    "dropout above 1": (
        {"layer_dropout.max_probability": 1.5},
        "layer_dropout.max_probability: must be less than 1, got 1.5",
    ),
    "negative dropout": (
        {"layer_dropout.max_probability": -0.1},
        "layer_dropout.max_probability: must be at least 0, got -0.1",
    ),
    "schedule without dropout": (
        {"layer_dropout.schedule": "exponential"},
        "layer_dropout.schedule = exponential .*layer_dropout.max_probability = 0.0",
    ),
    "dropout of the only layer": (
        {"layer_dropout.max_probability": 0.1, "model.num_layers": 1},
        "layer_dropout.max_probability = 0.1 .*model.num_layers = 1",
    ),
    "schedule of one step": (
        {
            "layer_dropout.max_probability": 0.1,
            "layer_dropout.schedule": "exponential",
            "training.steps": 1,
        },
        "layer_dropout.schedule = exponential .*training.steps = 1",
    ),
    "dropout of frozen layers": (
        TUNING | {"layer_dropout.max_probability": 0.1},
        "layer_dropout.max_probability = 0.1 .*tuning.checkpoint = runs/a.*checkpoint.initial",
    ),
    "dropout with deepspeed": (
        {"layer_dropout.max_probability": 0.1, "parallel.engine": "deepspeed"},
        "layer_dropout.max_probability = 0.1 .*parallel.engine = deepspeed.*to megatron",
    ),
    "shared norm of no exit": (
        {"exits.norm": "shared"},
        "exits.norm = shared .*exits.boundaries = []",
    ),
    "shared norm of heads without a norm": (
        SHARED | {"exits.head": ("mlp",)},
        "exits.norm = shared .*exits.head = ['mlp']",
    ),
    "shared norm with a frozen model": (
        TUNING | {"exits.norm": "shared"},
        "exits.norm = shared .*tuning.checkpoint = runs/a",
    ),
    "shared norm with deepspeed": (
        SHARED | {"parallel.engine": "deepspeed"},
        "exits.norm = shared .*parallel.engine = deepspeed",
    ),
    "scale of given weights": (
        {"exits.depth_scale": 0.5},
        "exits.depth_scale = 0.5 .*exits.weighting = weights.*exits.weighting = depth",
    ),
    "curriculum of given weights": (
        {"exits.curriculum": "gradual"},
        "exits.curriculum = gradual .*exits.weighting = weights",
    ),
    "weights by depth without exits": (
        {"exits.weighting": "depth"},
        "exits.weighting = depth requires early exits, but exits.boundaries = []",
    ),
    "weights by depth of the first layer only": (
        {"exits.weighting": "depth", "exits.boundaries": (1,)},
        "exits.boundaries = [1] .*exits.weighting = depth",
    ),
    "two kinds of weights": (
        DEPTH | {"exits.boundaries": (2, 4), "exits.weights": (0.25, 0.5)},
        "exits.weights = [0.25, 0.5] .*exits.weighting = depth",
    ),
    "schedule of weights by depth": (
        DEPTH | {"exits.weight_schedule": "linear"},
        "exits.weight_schedule = linear .*exits.weighting = depth.*exits.curriculum",
    ),
    "weights by depth of tuned exits": (
        TUNING | {"exits.weighting": "depth"},
        "exits.weighting = depth .*tuning.checkpoint = runs/a",
    ),
    "rotation by more exits than there are": (
        ROTATION | {"exits.rotation_interval": 9},
        "exits.rotation_interval = 9 must be from 2 to 8",
    ),
    "rotation without an interval": (
        ROTATION,
        "exits.rotation_interval = 1 must be from 2 to 8",
    ),
    "rotation longer than training": (
        ROTATION | {"exits.rotation_interval": 8, "training.steps": 7},
        "exits.rotation_interval = 8 is longer than training.steps = 7",
    ),
    "interval without rotation": (
        DEPTH | {"exits.curriculum": "gradual", "exits.rotation_interval": 2},
        "exits.rotation_interval = 2 .*exits.curriculum = gradual",
    ),
    "gradual curriculum longer than training": (
        DEPTH | {"exits.curriculum": "gradual", "training.steps": 15},
        "exits.curriculum = gradual is longer than training.steps = 15.*training.steps = 16",
    ),
    "own parameters that are never trained": (
        DEPTH | {"exits.output": "own", "exits.boundaries": "all"},
        "exits.weighting = depth does not train the exit after the first layer.*"
        "exits.output = own.*from 2 on",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors_name_options_values_and_remedy(case: str) -> None:
    assert_message(*CASES[case])


@pytest.mark.parametrize(
    "overrides",
    [
        ROTATION | {"exits.rotation_interval": 8, "training.steps": 8},
        DEPTH | {"exits.curriculum": "gradual", "training.steps": 16},
        DEPTH | {"exits.norm": "shared", "exits.head": ("mlp", "norm"), "exits.boundaries": (2, 3)},
        {"layer_dropout.max_probability": 0.999, "parallel.engine": "megatron"},
        {"exits.weighting": "depth", "exits.boundaries": (1, 2)},
    ],
)
def test_similar_but_valid_combinations(overrides: dict[str, Any]) -> None:
    config = load_config(overrides={"model.shape": "llama-tiny", **overrides})
    assert load_config(None, config.model_dump()) == config


def test_all_boundaries_are_those_of_the_model(tmp_path) -> None:
    """They follow the number of layers that takes precedence, and are saved as numbers."""
    file = tmp_path / "a.toml"
    file.write_text('[model]\nshape = "llama-tiny"\n[exits]\nboundaries = "all"\n')
    assert load_config(file).exits.boundaries == tuple(range(1, 8))
    shorter = load_config(file, {"model.num_layers": 3})
    assert shorter.exits.boundaries == (1, 2)
    assert len(shorter.exits.weights) == 2
    assert "boundaries = [1, 2]" in shorter.to_toml()


def test_all_boundaries_of_an_invalid_model_report_only_the_model() -> None:
    error = message({"model.num_layers": -3, "exits.boundaries": "all"})
    assert error.startswith("model.num_layers: must be greater than 0, got -3")
    assert "\n" not in error


def test_the_command_line_accepts_the_word_all() -> None:
    command = CommandHelp("train", "", ())
    for words, expected in ((["all"], "all"), (["2", "4"], (2, 4)), (["2,4"], (2, 4))):
        arguments = ["--exits.boundaries", *words]
        values = parse_values(config_options(), command, arguments)
        assert values == {"exits.boundaries": expected}
