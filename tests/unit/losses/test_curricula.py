"""LayerSkip's exit weights and curricula, against values worked out by hand from its equations."""

import pytest

from ee_llm.losses.curricula import (
    depth_scale,
    depth_weights,
    enabled_exits,
    gradual_curriculum,
    rotational_curriculum,
)


def test_scales_grow_with_the_sum_of_the_layers_below():
    """L = 4: e = s * (0, 0+1, 0+1+2) for the early layers, and 3 + s * (0+1+2) for the last."""
    assert [depth_scale(layer, 4, 1.0) for layer in range(4)] == [0, 1, 3, 6]
    assert [depth_scale(layer, 4, 0.5) for layer in range(4)] == [0, 0.5, 1.5, 4.5]
    # L = 32, e_scale = 0.2, as in the recipe for Llama2-7B: sums 0 + ... + 7 and 0 + ... + 30.
    assert depth_scale(7, 32, 0.2) == pytest.approx(5.6)
    assert depth_scale(31, 32, 0.2) == pytest.approx(31 + 93)


def test_a_model_of_one_layer_has_only_the_final_exit():
    assert depth_weights((1,), 2, 1.0, [True]) == {}
    assert depth_weights((1, 2), 2, 1.0, [True, True]) == {2: 1.0}


def test_weights_sum_to_one_over_the_enabled_exits():
    """L = 4 and s = 0.5: e = (0, 0.5, 1.5, 4.5)."""
    every = depth_weights((1, 2, 3, 4), 4, 0.5, [True] * 4)
    assert every == {2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5}  # e(0) = 0: boundary 1 is left out
    some = depth_weights((1, 2, 3, 4), 4, 0.5, [True, False, True, True])
    assert some == {3: 1.5 / 6, 4: 4.5 / 6}
    # With exits at some layers only, e still depends on the layers below, not on the exits below.
    assert depth_weights((3, 4), 4, 0.5, [True, True]) == {3: 1.5 / 6, 4: 4.5 / 6}


def test_the_rotation_shifts_by_one_exit_per_step():
    """L = 6, R = 3: layers 0 and 3, then 1 and 4, then 2 and 5, then again; 5 is the final exit."""
    on = [
        [exit_ for exit_, is_on in enumerate(rotational_curriculum(step, 6, 3)) if is_on]
        for step in range(4)
    ]
    assert on == [[0, 3, 5], [1, 4, 5], [2, 5], [0, 3, 5]]


@pytest.mark.parametrize(("num_exits", "interval"), [(8, 8), (40, 39), (7, 2)])
def test_each_early_exit_is_trained_once_per_rotation(num_exits, interval):
    steps = [rotational_curriculum(step, num_exits, interval) for step in range(10, 10 + interval)]
    for exit_ in range(num_exits - 1):
        assert sum(step[exit_] for step in steps) == 1
    early = [sum(step[:-1]) for step in steps]
    assert max(early) <= -(-num_exits // interval)  # the paper's ceil(L / R)


def test_the_gradual_curriculum_takes_half_of_training():
    """L = 4, T = 24: one exit every T / (2 L) = 3 steps, from the last one."""
    on = {step: gradual_curriculum(step, 4, 24) for step in range(24)}
    assert all(on[step] == [False, False, False, True] for step in (0, 1, 2))
    assert all(on[step] == [False, False, True, True] for step in (3, 4, 5))
    assert all(on[step] == [False, True, True, True] for step in (6, 7, 8))
    assert all(on[step] == [True] * 4 for step in range(9, 24))


def test_without_a_curriculum_all_exits_are_enabled():
    assert enabled_exits("none", 3, 4, 10, 1) == [True] * 4
    assert enabled_exits("rotational", 1, 4, 10, 3) == [False, True, False, True]
    assert enabled_exits("gradual", 0, 4, 10, 1) == [False, False, False, True]
