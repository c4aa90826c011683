"""The weights of exit losses over the steps of a run."""

import pytest

from ee_llm.config import load_config
from ee_llm.training.schedule import exit_weights

MODEL = {
    "model.num_layers": 6,
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.vocab_size": 32,
    "exits.boundaries": (2, 4),
    "exits.weights": (0.25, 0.5),
}


def weights(step, **options):
    return exit_weights(load_config(None, MODEL | options), step)


def test_constant():
    for step in (0, 1, 5000):
        assert weights(step) == {2: 0.25, 4: 0.5, 6: 1.0}


def test_linear_starts_and_ends_at_the_configured_weights():
    options = {
        "exits.weight_schedule": "linear",
        "exits.initial_weights": (0.0, 1.0),
        "exits.schedule_steps": 10,
    }
    assert weights(0, **options) == {2: 0.0, 4: 1.0, 6: 1.0}
    assert weights(5, **options) == {2: pytest.approx(0.125), 4: pytest.approx(0.75), 6: 1.0}
    assert weights(10, **options) == weights(11, **options) == {2: 0.25, 4: 0.5, 6: 1.0}


def test_model_without_early_exits_has_the_final_exit():
    options = {"exits.boundaries": (), "exits.weights": ()}
    assert weights(0, **options) == {6: 1.0}
