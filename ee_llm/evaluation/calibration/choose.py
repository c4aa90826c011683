"""Choose thresholds whose risk is at most a limit, with a stated probability."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ee_llm.errors import DataError
from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.risk import p_value, samples_needed
from ee_llm.evaluation.calibration.search import Costs, Point, Thresholds, find_path


@dataclass(frozen=True)
class Choice:
    """Thresholds and what is known about them.

    Attributes:
        thresholds: One per early exit; None is off. All are off, with a risk of 0, if no other
            thresholds passed the test.
        loss: Mean loss on the windows of the test, an estimate of the risk.
        cost: Mean cost of a token on these windows, in layers, heads included.
        shares: Share of these tokens that takes each exit, the final one last.
        p_value: P-value of the hypothesis that the risk exceeds the limit, None with all exits off.
        heads: Mean number of heads that a token computes.
        least_final_share: Share of the tokens that must take the final exit even with a perfect
            measure of confidence, because no early exit agrees and the risk is used up.
        num_windows: Number of windows of the test.
        num_tokens: Number of their tokens.
    """

    thresholds: Thresholds
    loss: float
    cost: float
    shares: tuple[float, ...]
    heads: float
    p_value: float | None
    least_final_share: float
    num_windows: int
    num_tokens: int


def split(records: Records, seed: int) -> tuple[Records, Records]:
    """Return the windows of the search and those of the test: random halves."""
    order = torch.randperm(records.num_windows, generator=torch.Generator().manual_seed(seed))
    half = records.num_windows // 2
    return records.part(order[:half].sort().values), records.part(order[half:].sort().values)


def choose(
    records: Records,
    costs: Costs,
    limit: float,
    delta: float,
    seed: int = 0,
    find: Callable[[Records, Costs, float], list[Point]] = find_path,
) -> Choice:
    """Return the thresholds with the largest saving that pass the test.

    A path of thresholds is found on half of the windows. On the other half, its points are tested
    in order until one fails (fixed-sequence testing: Angelopoulos et al., Learn then test,
    arXiv 2110.01052, section 2.2). The probability that the chosen thresholds have a risk above
    `limit` is at most `delta`, if windows are independent and like those of later use. The risk is
    the expected mean loss of a window.

    Args:
        records: The held-out text.
        costs: The cost of each exit.
        limit: Greatest risk.
        delta: Greatest probability that the risk exceeds the limit.
        seed: Seed of the split.
        find: Returns the path of thresholds, from safe to risky, for the windows of the search.

    Raises:
        DataError: The text has too few windows to show anything about this risk.
    """
    check_size(records.num_windows, limit, delta)
    searched, tested = split(records, seed)
    chosen, probability = _test(find(searched, costs, limit), tested, limit, delta)
    return _describe(tested, costs, limit, chosen, probability)


def check_size(
    num_windows: int,
    limit: float,
    delta: float,
    num_tokens: int = 0,
    risk: float | None = None,
    what: str = "windows",
) -> None:
    """Raise DataError if no thresholds could pass the test with half of so many windows.

    Args:
        num_windows: Number of windows, or of questions that the final exit answers right.
        limit: Greatest mean loss of a window.
        delta: Greatest probability that it is exceeded.
        num_tokens: Number of tokens of the windows, for the message.
        risk: The risk as the user stated it, for the message; None for `limit`.
        what: What the windows are, for the message.
    """
    needed = 2 * samples_needed(limit, delta)
    if num_windows < needed:
        stated = limit if risk is None else risk
        about, remedy = "", f"more {what}"
        if what == "windows":
            remedy = "more text, a shorter seq_length"
            if num_tokens:
                about = f", about {num_tokens * needed // num_windows:,} tokens"
        raise DataError(
            f"the text has {num_windows:,} {what}, too few for risk = {stated:g} with delta ="
            f" {delta:g}: even without any error, {needed:,} are needed{about}. Give {remedy}, or a"
            " larger risk."
        )


def _test(
    path: list[Point], tested: Records, limit: float, delta: float
) -> tuple[Thresholds, float | None]:
    """Return the cheapest thresholds of the path before the first that fails, and their p-value.

    The first points of a path can cost more than no exits: few tokens exit, and all others have
    computed the heads that they passed.
    """
    passed: list[tuple[Point, float | None]] = [(path[0], None)]
    for point in path[1:]:
        losses = tested.window_losses(tested.outcome(point.thresholds).losses)
        value = p_value(losses, limit)
        if value > delta:
            break
        passed.append((point, value))
    point, probability = min(passed, key=lambda one: one[0].cost)
    return point.thresholds, probability


def _describe(
    records: Records, costs: Costs, limit: float, thresholds: Thresholds, probability: float | None
) -> Choice:
    outcome = records.outcome(thresholds)
    counts = torch.bincount(outcome.exits, minlength=len(records.boundaries) + 1)
    never_right = float((records.losses > 0).all(dim=0).double().mean())
    return Choice(
        thresholds,
        float(records.window_losses(outcome.losses).mean()),
        float(costs.of(outcome.exits, thresholds).mean()),
        tuple((counts.double() / records.num_tokens).tolist()),
        float(costs.heads(thresholds)[outcome.exits].mean()),
        probability,
        max(0.0, never_right - limit),
        records.num_windows,
        records.num_tokens,
    )
