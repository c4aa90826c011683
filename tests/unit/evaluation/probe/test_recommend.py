"""The recommended exits against all sets of exits."""

from itertools import combinations

import pytest
import torch

from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.search import Costs, best_point
from ee_llm.evaluation.probe.recommend import recommend

BOUNDARIES = (2, 4, 6, 8, 10)
NUM_LAYERS, RISK = 12, 0.05


def make_records(seed: int, num_tokens: int = 600) -> Records:
    """Return records of exits that are surer and more often right the deeper they are."""
    generator = torch.Generator().manual_seed(seed)
    ease = torch.rand(num_tokens, generator=generator)
    confidence, losses = [], []
    for boundary in BOUNDARIES:
        skill = 0.4 + 1.2 * torch.rand(1, generator=generator) * boundary / NUM_LAYERS
        noise = 0.3 * torch.rand(num_tokens, generator=generator)
        confidence.append((ease * skill + noise).clamp(0.001, 1))
        is_right = torch.rand(num_tokens, generator=generator) < (ease + skill / 2).clamp(0, 1) ** 2
        losses.append(1 - is_right.float())
    windows = torch.arange(num_tokens) // 50
    return Records(BOUNDARIES, torch.stack(confidence), torch.stack(losses), windows)


def best_savings(records: Records, costs: Costs, num_exits: int) -> list[float]:
    """Return what the best of all sets of at most 1, 2, ... exits saves."""
    savings = []
    for size in range(1, num_exits + 1):
        sets = (s for n in range(size + 1) for s in combinations(range(len(BOUNDARIES)), n))
        least = min(best_point(records, costs, used, RISK).cost for used in sets)
        savings.append(1 - least / costs.full)
    return savings


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head", [0.2, 1.5])
def test_the_best_sets_of_exits_are_found(seed: int, head: float) -> None:
    records, costs = make_records(seed), Costs(BOUNDARIES, NUM_LAYERS, head)
    found = recommend(records, costs, RISK, 3)
    assert [one.num_exits for one in found] == [1, 2, 3]
    assert [one.saving for one in found] == pytest.approx(best_savings(records, costs, 3))
    assert all(len(one.exits) <= one.num_exits for one in found)
    # Adding and exchanging exits, as in a model with many layers, comes close.
    greedy = [one.saving for one in recommend(records, costs, RISK, 3, max_sets=0)]
    assert greedy == pytest.approx([one.saving for one in found], rel=0.02)
    assert greedy[0] == found[0].saving


def test_figures_are_those_of_the_thresholds() -> None:
    records, costs = make_records(1), Costs(BOUNDARIES, NUM_LAYERS, 0.2)
    one = recommend(records, costs, RISK, 2)[-1]
    assert one.saving > 0.05
    thresholds = dict(zip(one.exits, one.thresholds, strict=True))
    depths, heads, wrong = [], 0, 0
    for token in range(records.num_tokens):
        depth = NUM_LAYERS
        for index, boundary in enumerate(BOUNDARIES):
            if boundary not in thresholds:
                continue
            heads += 1
            if records.confidence[index, token] >= thresholds[boundary]:
                depth, wrong = boundary, wrong + int(records.losses[index, token])
                break
        heads += depth == NUM_LAYERS
        depths.append(depth)
    count = records.num_tokens
    assert one.mean_depth == pytest.approx(sum(depths) / count)
    assert one.final_share == pytest.approx(depths.count(NUM_LAYERS) / count)
    assert one.disagreement == pytest.approx(wrong / count)
    assert one.disagreement <= RISK
    cost = (sum(depths) + 0.2 * heads) / count
    assert one.saving == pytest.approx(1 - cost / (NUM_LAYERS + 0.2))


def test_no_exit_is_recommended_if_none_saves_anything() -> None:
    [one] = recommend(make_records(0), Costs(BOUNDARIES, NUM_LAYERS, 100.0), RISK, 1)
    assert (one.exits, one.thresholds, one.saving) == ((), (), 0.0)
    assert (one.mean_depth, one.final_share, one.disagreement) == (NUM_LAYERS, 1.0, 0.0)
