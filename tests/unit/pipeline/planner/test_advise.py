"""The search: balanced splits, the order of candidates, and fixed options."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_llm.config import load_config
from ee_llm.errors import ConfigError
from ee_llm.pipeline import PieceCost
from ee_llm.pipeline.planner.advise import advise, balanced_split, config_lines, within_limit
from ee_llm.pipeline.planner.costs import NOMINAL, Pieces
from ee_llm.pipeline.planner.predict import predict, rank_memory
from ee_llm.pipeline.selection import select_fills

MODEL = {
    "model.num_layers": 12,
    "model.hidden_size": 8,
    "model.num_heads": 1,
    "model.vocab_size": 8,
    "parallel.pipeline": 4,
    "exits.boundaries": (3, 6),
}


def search(pieces=NOMINAL, num_microbatches=8, limit=math.inf, **fixed):
    kept = {name.replace("__", "."): value for name, value in fixed.items()}
    return advise(
        load_config(None, MODEL | kept),
        lambda options: load_config(None, MODEL | kept | options),
        kept,
        num_microbatches,
        pieces,
        limit=limit,
    )


quarters = st.integers(0, 12).map(lambda quarter: quarter / 4)


@settings(deadline=None, max_examples=60)
@given(
    num_layers=st.integers(1, 9),
    num_stages=st.integers(1, 4),
    exits=st.sets(st.integers(1, 8)),
    placement=st.sampled_from(["post", "pre"]),
    head=quarters,
    final=quarters,
    embedding=quarters,
)
def test_no_split_has_a_faster_slowest_stage(
    num_layers, num_stages, exits, placement, head, final, embedding
):
    """Compares with all splits, with the costs that `Pieces.costs` computes."""
    if num_stages > num_layers:
        return
    boundaries = tuple(sorted(b for b in exits if b < num_layers))
    pieces = Pieces(
        PieceCost(1, 2), PieceCost(embedding, 0), PieceCost(head, head), PieceCost(final, final)
    )

    def slowest(split):
        config = load_config(
            None,
            MODEL
            | {
                "model.num_layers": num_layers,
                "parallel.pipeline": num_stages,
                "parallel.layer_split": split,
                "exits.boundaries": boundaries,
                "exits.placement": placement,
            },
        )
        stages = pieces.costs(config).stages
        return max(s.forward + s.backward + sum(map(sum, s.exits)) for s in stages)

    cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
    splits = [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers))) for cut in cuts]
    found = balanced_split(num_layers, num_stages, pieces, boundaries, placement)
    assert slowest(found) == min(map(slowest, splits))


def test_candidates_are_ordered_by_time_and_match_predictions():
    found = search()
    times = [advice.prediction.time_per_microbatch for advice in found]
    assert times == sorted(times)
    assert len(found) > 10
    for advice in found:
        again = predict(load_config(None, MODEL | advice.options), 8, NOMINAL)
        assert again.time_per_microbatch == advice.prediction.time_per_microbatch
    tried = [advice.prediction.config for advice in found]
    assert {config.parallel.schedule for config in tried} == {
        "1f1b",
        "zero-bubble",
        "zero-bubble-exits",
    }
    assert {config.parallel.virtual for config in tried} == {1, 2, 3}
    assert {config.exits.placement for config in tried} == {"post", "pre"}
    assert {sum(select_fills(config)) for config in tried} == {0, 1, 2, 3, 4}
    assert [advice.options for advice in search()] == [advice.options for advice in found]


def test_best_plan_beats_the_default_and_balances_an_expensive_head():
    dear = replace(NOMINAL, final=PieceCost(2.0, 4.0))
    best = search(dear, parallel__schedule="1f1b", parallel__virtual=1)[0].prediction
    plain = predict(load_config(None, MODEL), 8, dear)
    assert best.time_per_microbatch < plain.time_per_microbatch
    assert best.config.parallel.layer_split[-1] < 3


def test_equal_times_prefer_less_memory_and_no_filling():
    found = search(parallel__schedule="1f1b", parallel__virtual=1)
    for one, other in itertools.pairwise(found):
        times = [x.prediction.time_per_microbatch for x in (one, other)]
        if times[0] == pytest.approx(times[1], rel=1e-9):
            assert one.memory <= other.memory
    assert select_fills(found[0].prediction.config) == (0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parallel.schedule", "zero-bubble"),
        ("parallel.virtual", 3),
        ("parallel.layer_split", (4, 3, 3, 2)),
        ("exits.placement", "pre"),
        ("parallel.fill_cooldown", 1),
    ],
)
def test_fixed_options_do_not_change(name, value):
    section, _, field = name.partition(".")
    found = search(**{name.replace(".", "__"): value})
    assert {getattr(getattr(a.prediction.config, section), field) for a in found} == {value}


def test_fixed_filling_is_kept():
    found = search(parallel__fill_cooldown="auto")
    assert found
    assert {select_fills(advice.prediction.config)[1] for advice in found} == {2}
    assert {advice.prediction.config.parallel.schedule for advice in found} == {"1f1b"}


def test_incomplete_groups_of_microbatches_are_not_interleaved():
    assert {a.prediction.config.parallel.virtual for a in search(num_microbatches=6)} == {1}
    with pytest.raises(ConfigError, match="no plan for 6 microbatches"):
        search(num_microbatches=6, parallel__virtual=3)


def test_error_of_impossible_options_is_that_of_a_single_plan():
    with pytest.raises(ConfigError, match=r"fill_cooldown = 5: the largest useful number is 2"):
        search(parallel__fill_cooldown=5)
    with pytest.raises(ConfigError, match=r"fill_warmup = 1: .* early exit: there is none"):
        search(parallel__fill_warmup=1, exits__boundaries=())


def test_the_useful_number_of_fills_may_be_zero():
    found = search(parallel__fill_warmup="auto", exits__boundaries=())
    assert {select_fills(a.prediction.config) for a in found} == {(0, 0), (0, 2)}


def test_exits_are_split_if_it_is_faster_and_fits():
    """With an expensive head the last stage has fewer layers, and its W delays the other ranks."""
    expensive = replace(NOMINAL, final=PieceCost(2.0, 4.0, 2.0))
    found = search(expensive, exits__boundaries=(), parallel__virtual=1)
    assert found[0].options["parallel.schedule"] == "zero-bubble-exits"
    leaner = within_limit(found, found[0].memory - 1)[0]
    assert leaner.options["parallel.schedule"] != "zero-bubble-exits"


def test_without_weight_costs_no_gradients_are_deferred():
    bare = replace(NOMINAL, layer=PieceCost(1, 2))
    assert {a.prediction.config.parallel.schedule for a in search(bare)} == {"1f1b"}


def test_limit_filters_candidates_and_the_error_names_the_leanest():
    found = search()
    leanest = min(advice.memory for advice in found)
    fitting = within_limit(found, leanest)
    assert fitting
    assert {advice.memory for advice in fitting} == {leanest}
    assert within_limit(found, None) == found
    with pytest.raises(ValueError, match=rf"all {len(found)} plans\. Raise it to {leanest:g} "):
        within_limit(found, leanest - 1)


@pytest.mark.thorough
def test_layers_move_to_ranks_with_free_memory():
    """1F1B keeps 4 microbatches on the first stage and 1 on the last: an even split needs 4 x 3."""
    assert min(advice.memory for advice in search()) > 11
    fitting = within_limit(search(limit=11), 11)
    best = fitting[0].prediction
    assert best.config.parallel.schedule == "1f1b"
    assert best.config.parallel.layer_split[0] == 2
    splits = (
        split
        for split in itertools.product(range(1, 10), repeat=4)
        if sum(split) == MODEL["model.num_layers"]
    )
    found = []
    for split, placement in itertools.product(splits, ("post", "pre")):
        options = {"parallel.layer_split": split, "exits.placement": placement}
        prediction = predict(load_config(None, MODEL | options), 8, NOMINAL)
        if max(rank_memory(prediction)) <= 11:
            found.append(prediction.time_per_microbatch)
    assert best.time_per_microbatch == min(found)
    options = [advice.options for advice in fitting]
    assert all(one != other for one, other in itertools.combinations(options, 2))
    kept = search(limit=11, parallel__layer_split=(3, 3, 3, 3))
    assert {a.prediction.config.parallel.layer_split for a in kept} == {(3, 3, 3, 3)}


def test_config_lines_give_the_same_plan(tmp_path):
    for advice in search():
        path = tmp_path / "plan.toml"
        path.write_text(config_lines(advice.prediction))
        model = {name: value for name, value in MODEL.items() if name.startswith("model.")}
        config = load_config(path, model)
        assert predict(config, 8, NOMINAL).plan == advice.prediction.plan
        assert config.exits == advice.prediction.config.exits
        assert config.parallel == advice.prediction.config.parallel
