"""The learning rate against values computed by hand."""

import pytest

from ee_llm.config import OptimizerConfig
from ee_llm.training.schedule import SCHEDULES, learning_rate, wasted_steps


def rates(steps, total=100, **options):
    config = OptimizerConfig(**{"lr": 1.0, "min_lr": 0.2, **options})
    return [learning_rate(step, config, total) for step in steps]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_reaches_the_full_rate(schedule):
    found = rates([1, 5, 9, 10], schedule=schedule, warmup_steps=10, wsd_decay_steps=20)
    assert found == pytest.approx([0.1, 0.5, 0.9, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # after warm-up (20) and before the step after decay (100): u = 0, 1/4, 1/2, 3/4, 1, beyond
        ("cosine", [1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2, 0.2]),
        ("linear", [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("constant", [1.0] * 6),
        # the last 40 steps decay: full at 60
        ("wsd", [1.0, 1.0, 1.0, 0.6, 0.2, 0.2]),
    ],
)
def test_decay(schedule, expected):
    steps = [21, 41, 61, 81, 101, 121]
    found = rates(steps, schedule=schedule, warmup_steps=20, wsd_decay_steps=40)
    assert found == pytest.approx(expected)


def test_decay_steps_end_the_decay_before_the_run():
    assert rates([26, 51, 75], schedule="linear", decay_steps=50, min_lr=0.0) == [0.5, 0.0, 0.0]


def test_without_warmup_the_first_step_has_the_full_rate():
    assert rates([1, 2], schedule="linear", min_lr=0.0) == pytest.approx([1.0, 0.99])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 100])
def test_the_last_step_trains(schedule, total):
    """The rate of the last step was min_lr, so that with 0 a run of one step trained nothing."""
    options = {"schedule": schedule, "min_lr": 0.0, "wsd_decay_steps": 1}
    assert all(rate > 0 for rate in rates(range(1, total + 1), total, **options))


def test_wsd_decay_longer_than_the_run_starts_after_warmup():
    found = rates([11, 56, 101], schedule="wsd", warmup_steps=10, wsd_decay_steps=1000)
    assert found == pytest.approx([1.0, 0.6, 0.2])


def test_wsd_without_decay_steps_stays_constant():
    assert rates([99, 100, 101], schedule="wsd") == [1.0, 1.0, 0.2]


def test_warmup_longer_than_the_run():
    assert rates([50], total=10, warmup_steps=100) == [0.5]


def test_warning_names_steps_that_train_nothing():
    wasteful = OptimizerConfig(schedule="linear", decay_steps=50)
    assert wasted_steps(wasteful, 100).startswith("steps 51 to 100 train nothing: ")
    for options in ({}, {"decay_steps": 100}, {"decay_steps": 50, "min_lr": 1e-9}):
        assert wasted_steps(OptimizerConfig(**options), 100) == ""
    for schedule in ("constant", "cosine"):
        assert wasted_steps(OptimizerConfig(schedule=schedule, warmup_steps=10), 5) == ""


def test_errors():
    with pytest.raises(ValueError, match="step = 0"):
        rates([0])
    config = OptimizerConfig().model_copy(update={"schedule": "cosin"})
    with pytest.raises(ValueError, match=r"optimizer\.schedule = 'cosin'"):
        learning_rate(1, config, 10)
