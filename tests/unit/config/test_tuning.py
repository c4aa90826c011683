"""EE-Tuning's options: what goes together, and what is built."""

from typing import Any

import pytest

from ee_llm.architecture.partition import exit_stage, stage_layers
from ee_llm.config import load_config
from tests.unit.refusals import message

TUNED = {
    "model.shape": "llama-tiny",
    "tuning.checkpoint": "runs/a",
    "exits.boundaries": (2, 4, 6),
}
PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "no exit": (
        {"exits.boundaries": ()},
        "exits.boundaries = [] and tuning.checkpoint = runs/a: there is no exit to tune; name one",
    ),
    "an exit that is not there": (
        {"tuning.exits": (2, 5)},
        "tuning.exits = [2, 5] must increase and name exits of exits.boundaries = [2, 4, 6], for "
        "example [2]",
    ),
    "exits that do not increase": (
        {"tuning.exits": (4, 2)},
        "tuning.exits = [4, 2] must increase and name exits of exits.boundaries = [2, 4, 6], for "
        "example [2, 4]",
    ),
    "exits without a checkpoint": (
        {"tuning.checkpoint": None, "tuning.exits": (2,)},
        "tuning.exits = [2] has no effect without tuning.checkpoint; give both",
    ),
    "nothing to train": (
        {"exits.head": (), "exits.output": "tied"},
        "exits.head = [] with exits.output = tied leaves nothing to train: that output weight is "
        "the frozen model's; set exits.output = own, or give exits.head a norm, mlp or block",
    ),
    "no weight": (
        {"exits.weights": (0.0, 1.0, 0.0), "tuning.exits": (2, 6)},
        "exits.weights = [0.0, 1.0, 0.0] are 0 for all of tuning.exits = [2, 6], which leaves",
    ),
    "more stages than layers": (
        {"parallel.pipeline": 5, "tuning.exits": (2, 4)},
        "max(tuning.exits) = 4 is below 5 stages (parallel.pipeline = 5), each of which needs a",
    ),
    "a split of layers that are not built": (
        {"parallel.pipeline": 2, "parallel.layer_split": (4, 4)},
        "parallel.layer_split = [4, 4] must be 2 positive numbers (parallel.pipeline = 2) that add "
        "up to 6 (max(tuning.exits)), for example [3, 3]",
    ),
    "interleaving": (
        {"parallel.pipeline": 2, "parallel.virtual": 2},
        "parallel.virtual = 2 is about the backward passes of a whole model, and with "
        "tuning.checkpoint = runs/a there are none; set it to 1",
    ),
    "zero bubble": (
        {"parallel.pipeline": 2, "parallel.schedule": "zero-bubble"},
        "parallel.schedule = zero-bubble is about the backward passes of a whole model",
    ),
    "filled bubbles": (
        {"parallel.pipeline": 2, "parallel.fill_cooldown": "auto"},
        "parallel.fill_cooldown = auto is about the backward passes of a whole model",
    ),
    "two beginnings": (
        {"checkpoint.initial": "runs/b"},
        "checkpoint.initial = runs/b beside tuning.checkpoint = runs/a: both say what to begin",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(case: str) -> None:
    options, expected = PROBLEMS[case]
    assert expected in message(TUNED | options)


def test_all_exits_are_tuned_unless_some_are_named() -> None:
    assert load_config(None, TUNED).tuning.exits == (2, 4, 6)
    some = load_config(None, TUNED | {"tuning.exits": (4,)})
    assert (some.tuning.exits, some.built_exits, some.depth) == ((4,), (4,), 4)
    plain = load_config(None, {"model.shape": "llama-tiny", "exits.boundaries": (2,)})
    assert (plain.tuning.exits, plain.built_exits, plain.depth) == ((), (2, 8), 8)


def test_layers_up_to_the_last_exit_are_cut_as_evenly_as_can_be() -> None:
    config = load_config(None, TUNED | {"parallel.pipeline": 4})
    assert [list(stage_layers(config, s)) for s in range(4)] == [[1, 2], [3, 4], [5], [6]]
    assert [exit_stage(config, b) for b in (2, 4, 6)] == [0, 1, 3]
    split = load_config(None, TUNED | {"parallel.pipeline": 2, "parallel.layer_split": (5, 1)})
    assert [len(stage_layers(split, s)) for s in range(2)] == [5, 1]


def test_a_pre_exit_behind_the_last_layer_is_on_the_last_stage() -> None:
    """The stage that would begin behind it is not built."""
    options = {"parallel.pipeline": 3, "exits.placement": "pre"}
    config = load_config(None, TUNED | options)
    assert [exit_stage(config, b) for b in (2, 4, 6)] == [1, 2, 2]


def test_a_saved_configuration_is_read_back_as_it_was(tmp_path) -> None:
    config = load_config(None, TUNED | {"tuning.exits": (2, 4)})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config


def test_what_is_below_gives_way_to_file_and_overrides(tmp_path) -> None:
    path = tmp_path / "tune.toml"
    path.write_text('[tuning]\ncheckpoint = "runs/a"\n[exits]\nhead = ["mlp"]\n')
    below = {
        "model": load_config(None, TUNED).model.model_dump(),
        "exits": {"boundaries": (1, 3), "head": ("norm",), "output": "own"},
    }
    config = load_config(path, {"exits.boundaries": (3,)}, below)
    assert config.model.num_layers == 8
    assert (config.exits.boundaries, config.exits.head) == ((3,), ("mlp",))
    assert config.exits.output == "own"
