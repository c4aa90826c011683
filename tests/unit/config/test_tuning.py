"""The EE-Tuning options: conflicts, and the layers and exits to build."""

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
        "exits.boundaries = [] has no exit to tune with tuning.checkpoint = runs/a",
    ),
    "an exit that does not exist": (
        {"tuning.exits": (2, 5)},
        "tuning.exits = [2, 5] must be increasing boundaries from exits.boundaries = [2, 4, 6], "
        "for example [2]",
    ),
    "exits that do not increase": (
        {"tuning.exits": (4, 2)},
        "tuning.exits = [4, 2] must be increasing boundaries from exits.boundaries = [2, 4, 6], "
        "for example [2, 4]",
    ),
    "exits without a checkpoint": (
        {"tuning.checkpoint": None, "tuning.exits": (2,)},
        "tuning.exits = [2] has no effect without tuning.checkpoint",
    ),
    "nothing to train": (
        {"exits.head": (), "exits.output": "tied"},
        "exits.head = [] with exits.output = tied leaves no parameters to train",
    ),
    "no weight": (
        {"exits.weights": (0.0, 1.0, 0.0), "tuning.exits": (2, 6)},
        "exits.weights = [0.0, 1.0, 0.0] are 0 for all of tuning.exits = [2, 6]",
    ),
    "more stages than layers": (
        {"parallel.pipeline": 5, "tuning.exits": (2, 4)},
        "max(tuning.exits) = 4 is less than the number of pipeline stages, 5",
    ),
    "a split of layers that are not built": (
        {"parallel.pipeline": 2, "parallel.layer_split": (4, 4)},
        "parallel.layer_split = [4, 4] must be 2 positive numbers (parallel.pipeline = 2) with the "
        "sum 6 (max(tuning.exits)), for example [3, 3]",
    ),
    "interleaving": (
        {"parallel.pipeline": 2, "parallel.virtual": 2},
        "parallel.virtual = 2 requires the backward pass of an entire model, which tuning "
        "(tuning.checkpoint = runs/a) does not run. Set it to 1.",
    ),
    "zero bubble": (
        {"parallel.pipeline": 2, "parallel.schedule": "zero-bubble"},
        "parallel.schedule = zero-bubble requires the backward pass of an entire model",
    ),
    "filled bubbles": (
        {"parallel.pipeline": 2, "parallel.fill_cooldown": "auto"},
        "parallel.fill_cooldown = auto requires the backward pass of an entire model",
    ),
    "an objective without a checkpoint": (
        {"tuning.checkpoint": None, "tuning.objective": "distill"},
        "tuning.objective = distill has no effect without tuning.checkpoint",
    ),
    "a temperature without a divergence": (
        {"tuning.temperature": 2.0},
        "tuning.temperature = 2.0 has no effect with tuning.objective = labels. Set "
        "tuning.objective to distill or both",
    ),
    "a temperature without tuning": (
        {"tuning.checkpoint": None, "tuning.temperature": 2.0},
        "tuning.temperature = 2.0 has no effect without tuning.checkpoint",
    ),
    "exits that are not deferred": (
        {"tuning.objective": "distill", "exits.deferred": False},
        "exits.deferred = false has no effect with tuning.objective = distill",
    ),
    "a temperature of 0": (
        {"tuning.objective": "distill", "tuning.temperature": 0},
        "tuning.temperature: must be at least 1e-06, got 0",
    ),
    "more stages than layers of a distilled model": (
        {"parallel.pipeline": 9, "tuning.objective": "distill"},
        "model.num_layers = 8 is less than the number of pipeline stages, 9",
    ),
    "two sources of initial parameters": (
        {"checkpoint.initial": "runs/b"},
        "checkpoint.initial = runs/b conflicts with tuning.checkpoint = runs/a",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems(case: str) -> None:
    options, expected = PROBLEMS[case]
    assert expected in message(TUNED | options)


def test_tuning_exits_defaults_to_all_boundaries() -> None:
    assert load_config(None, TUNED).tuning.exits == (2, 4, 6)
    some = load_config(None, TUNED | {"tuning.exits": (4,)})
    assert (some.tuning.exits, some.trained_exits, some.depth) == ((4,), (4,), 4)
    plain = load_config(None, {"model.shape": "llama-tiny", "exits.boundaries": (2,)})
    assert (plain.tuning.exits, plain.built_exits, plain.depth) == ((), (2, 8), 8)
    assert plain.trained_exits == (2, 8)


@pytest.mark.parametrize(
    ("options", "depth", "is_whole"),
    [
        ({}, 6, True),  # the default validates
        ({"training.eval_interval": 0}, 6, False),
        ({"data.split": (1.0, 0.0, 0.0), "training.eval_interval": 0}, 6, False),
        ({"training.eval_interval": 0, "tuning.objective": "distill"}, 8, True),
        ({"training.eval_interval": 0, "tuning.objective": "both"}, 8, True),
    ],
)
def test_whole_model_is_built_to_compare_with_the_final_exit(options, depth, is_whole) -> None:
    config = load_config(None, TUNED | options)
    assert (config.depth, config.is_whole) == (depth, is_whole)
    assert config.built_exits == ((2, 4, 6, 8) if is_whole else (2, 4, 6))
    assert list(stage_layers(config, 0)) == list(range(1, 9 if is_whole else 7))


def test_layers_up_to_the_last_exit_are_split_evenly() -> None:
    options = TUNED | {"parallel.pipeline": 4}
    config = load_config(None, options | {"training.eval_interval": 0})
    assert [list(stage_layers(config, s)) for s in range(4)] == [[1, 2], [3, 4], [5], [6]]
    assert [exit_stage(config, b) for b in (2, 4, 6)] == [0, 1, 3]
    whole = load_config(None, options)
    assert [list(stage_layers(whole, s)) for s in range(4)] == [[1, 2], [3, 4], [5], [6, 7, 8]]
    distilled = load_config(None, options | {"tuning.objective": "distill"})
    assert [list(stage_layers(distilled, s)) for s in (0, 3)] == [[1, 2], [7, 8]]
    split = TUNED | {"parallel.pipeline": 2, "parallel.layer_split": (5, 1)}
    config = load_config(None, split | {"training.eval_interval": 0})
    assert [len(stage_layers(config, s)) for s in range(2)] == [5, 1]


def test_pre_exit_after_the_last_layer_is_on_the_last_stage() -> None:
    """The stage that would begin after it is not built."""
    options = {"parallel.pipeline": 3, "exits.placement": "pre"}
    config = load_config(None, TUNED | options)
    assert [exit_stage(config, b) for b in (2, 4, 6)] == [1, 2, 2]


def test_saved_configuration_loads_as_an_equal_one(tmp_path) -> None:
    config = load_config(None, TUNED | {"tuning.exits": (2, 4)})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config


def test_file_and_overrides_take_precedence_over_defaults(tmp_path) -> None:
    path = tmp_path / "tune.toml"
    path.write_text('[tuning]\ncheckpoint = "runs/a"\n[exits]\nhead = ["mlp"]\n')
    defaults = {
        "model": load_config(None, TUNED).model.model_dump(),
        "exits": {"boundaries": (1, 3), "head": ("norm",), "output": "own"},
    }
    config = load_config(path, {"exits.boundaries": (3,)}, defaults)
    assert config.model.num_layers == 8
    assert (config.exits.boundaries, config.exits.head) == ((3,), ("mlp",))
    assert config.exits.output == "own"
