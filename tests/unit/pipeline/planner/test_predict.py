"""Predictions: the plan of the trainer, the placement of exits, and the memory of ranks."""

import math

import pytest

from ee_llm.config import load_config
from ee_llm.pipeline import Op
from ee_llm.pipeline.planner.costs import NOMINAL
from ee_llm.pipeline.planner.predict import predict, rank_memory
from ee_llm.pipeline.selection import largest_fills


def config_of(**options):
    values = {"model.num_layers": 24, "model.hidden_size": 8, "model.num_heads": 1}
    values |= {"model.vocab_size": 8, "parallel.pipeline": 4}
    return load_config(None, values | {k.replace("__", "."): v for k, v in options.items()})


@pytest.mark.parametrize(("placement", "stages"), [("post", {0, 1, 3}), ("pre", {1, 2, 3})])
def test_exits_run_on_the_stages_of_their_placement(placement, stages):
    config = config_of(exits__boundaries=(6, 12), exits__placement=placement)
    found = predict(config, 8, NOMINAL)
    spans = [span for rank in found.simulation.timeline.ranks for span in rank]
    with_exits = [span for span in spans if found.exit_part(span) is not None]
    assert {span.action.stage for span in with_exits} == stages
    assert {span.action.op for span in with_exits} == {Op.BACKWARD}
    for span in with_exits:
        assert found.exit_part(span) == (span.start, span.start + 3)


def test_exits_that_are_not_deferred_run_in_forward_and_backward():
    config = config_of(exits__boundaries=(6,), exits__deferred=False)
    found = predict(config, 8, NOMINAL)
    first, *_, last = found.simulation.timeline.ranks[0]
    assert found.exit_part(first) == (first.end - 1, first.end)
    assert found.exit_part(last) == (last.start, last.start + 2)


def test_split_exits_run_first_in_backward_and_weight_actions():
    config = config_of(exits__boundaries=(6,), parallel__schedule="zero-bubble-exits")
    found = predict(config, 8, NOMINAL)
    parts = {
        span.action.op: (found.exit_part(span), (span.start, span.end))
        for span in found.simulation.timeline.ranks[0]
    }
    assert parts[Op.FORWARD][0] is None
    (exits, (start, end)), (weights, (first, last)) = parts[Op.BACKWARD], parts[Op.WEIGHT]
    assert (exits, end) == ((start, start + 2), start + 2 + 6)
    assert (weights, last) == ((first, first + 1), first + 1 + 6)


def test_exit_time_is_the_difference_to_the_plan_without_exits():
    """Three exits on stage 0 make it the slowest: 9 more than the final exit's 3, less 3 hidden."""
    config = config_of(exits__boundaries=(4, 5, 6))
    found = predict(config, 8, NOMINAL)
    without = predict(config_of(), 8, NOMINAL)
    assert without.exit_time == 0
    assert found.exit_time == found.simulation.makespan - without.simulation.makespan > 0


def test_memory_is_that_of_live_microbatches_and_one_exit():
    config = config_of(exits__boundaries=(6, 12))
    assert rank_memory(predict(config, 8, NOMINAL)) == (4 * 6 + 1, 3 * 6 + 1, 2 * 6, 6 + 1)
    assert rank_memory(predict(config, 8, NOMINAL), 2.5)[0] == 4 * 6 + 2.5
    split = config_of(parallel__layer_split=(9, 5, 5, 5))
    assert rank_memory(predict(split, 8, NOMINAL)) == (36, 15, 10, 6)
    naive = config_of(exits__boundaries=(6, 12), exits__deferred=False)
    assert rank_memory(predict(naive, 8, NOMINAL)) == (4 * 7, 3 * 7, 2 * 6, 7)
    exits = config_of(exits__boundaries=(6, 12), parallel__schedule="zero-bubble-exits")
    # Rank r keeps the gradients of the logits of r + 1 microbatches.
    assert rank_memory(predict(exits, 8, NOMINAL)) == (4 * 6 + 1, 4 * 6 + 2, 4 * 6, 4 * 6 + 4)


def test_memory_of_a_rank_is_the_peak_of_the_sum_over_its_stages():
    """The peaks of the stages are at different times, so that their sum would be too large."""
    found = predict(config_of(parallel__virtual=2), 8, NOMINAL)
    for rank, memory in enumerate(rank_memory(found, 0.0)):
        peaks = [found.simulation.peak_activations[stage] for stage in found.stages_of(rank)]
        assert 3 * max(peaks) <= memory <= 3 * sum(peaks)
    assert rank_memory(found, 0.0)[0] == 33  # 11 microbatches, although the two peaks sum to 12


def test_bubble_share_is_the_mean_over_ranks():
    found = predict(config_of(), 8, NOMINAL)
    assert found.bubble_share == pytest.approx(math.fsum(found.simulation.bubble_share) / 4)


@pytest.mark.parametrize(
    ("options", "fills"),
    [
        ({"exits__boundaries": (6,)}, (2, 2)),
        ({"exits__boundaries": (7,)}, (1, 2)),
        ({"exits__boundaries": (6,), "exits__placement": "pre"}, (1, 2)),
        ({"exits__boundaries": (13,)}, (0, 2)),
        ({}, (0, 2)),
        ({"exits__boundaries": (6,), "parallel__virtual": 2}, (0, 0)),
        ({"parallel__schedule": "zero-bubble"}, (0, 0)),
        ({"exits__boundaries": (6,), "parallel__forward_over_backward": 0.2}, (2, 2)),
        ({"exits__boundaries": (6,), "parallel__forward_over_backward": 1.0}, (1, 1)),
    ],
)
def test_largest_fills_are_the_most_that_a_plan_accepts(options, fills):
    assert largest_fills(config_of(**options)) == fills
    names = ("parallel__fill_warmup", "parallel__fill_cooldown")
    config = config_of(**options, **dict(zip(names, fills, strict=True)))
    assert len(predict(config, 8, NOMINAL).filling) == sum(fills)
    if "parallel__virtual" in options or "parallel__schedule" in options:
        return
    for name, most in zip(names, fills, strict=True):
        with pytest.raises(ValueError, match="the largest useful number is"):
            predict(config_of(**options, **{name: most + 1}), 8, NOMINAL)
