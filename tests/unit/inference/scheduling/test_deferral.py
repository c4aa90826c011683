"""How long rows wait for others: latency profiles, and when deferral pays."""

import pytest

from ee_llm.inference.scheduling.deferral import Deferral, LatencyProfile


def _constant(*seconds: float) -> LatencyProfile:
    """Return the profile of passes whose latency does not depend on their rows."""
    return LatencyProfile((1, 64), tuple((time, time) for time in seconds))


def _linear(*seconds: float) -> LatencyProfile:
    """Return the profile of passes whose latency is proportional to their rows."""
    return LatencyProfile((1, 64), tuple((time, 64 * time) for time in seconds))


def _deferral(
    passes: LatencyProfile,
    *rates: float,
    max_deferred_steps: int = 8,
    heads: LatencyProfile | None = None,
) -> Deferral:
    """Return a deferral that observed these rates of declined exits; heads cost 0 by default."""
    free = LatencyProfile((1,), ((0.0,),) * len(passes.seconds))
    deferral = Deferral(passes, heads or free, max_deferred_steps)
    for segment, declining in enumerate(rates):
        share = round(100 * declining)
        exited = [index * share // 100 == (index + 1) * share // 100 for index in range(100)]
        for _ in range(40):
            deferral.observe(segment, exited)
        assert deferral.rates[segment] == pytest.approx(declining, abs=0.02)
    return deferral


@pytest.mark.parametrize(
    ("num_rows", "seconds"),
    [(0.3, 1.0), (1, 1.0), (2, 1.5), (3, 2.0), (6, 8.0), (9, 14.0), (13, 22.0), (0, 1.0)],
)
def test_latencies_are_interpolated_and_extrapolated_linearly(
    num_rows: float, seconds: float
) -> None:
    profile = LatencyProfile((1, 3, 9), ((1.0, 2.0, 14.0), (5.0, 5.0, 5.0)))
    assert profile.time(0, num_rows) == pytest.approx(seconds)
    assert profile.time(1, num_rows) == 5.0


def test_a_single_measurement_applies_to_all_row_counts() -> None:
    assert LatencyProfile((1,), ((2.5,),)).time(0, 40) == 2.5


def test_tokens_per_second_of_an_example_computed_by_hand() -> None:
    """Two segments; half of 10 sequences decline, so 10 rows are ready, then 5, then 2.5.

    The first segment takes 1 s plus 0.1 s per row, the second 2 s plus 0.2 s per row.
    """
    profile = LatencyProfile((0, 100), ((1.0, 11.0), (2.0, 22.0)))
    deferral = _deferral(profile, 0.5)
    seconds = {1: 2.0 + 4.0, 2: 2.0 + 1.5 + 5.0, 3: 2.0 + 1.5 + 1.25 + 5.5}
    for passes, tokens in ((1, 10.0), (2, 15.0), (3, 17.5)):
        assert deferral.rate(1, 10, passes) == pytest.approx(tokens / seconds[passes], rel=0.01)


def test_heads_evaluate_only_frontiers() -> None:
    """The example above, with heads that take 1 s plus 0.1 s per row and see no row twice."""
    profile = LatencyProfile((0, 100), ((1.0, 11.0), (2.0, 22.0)))
    deferral = _deferral(profile, 0.5, heads=LatencyProfile((0, 100), ((1.0, 11.0), (1.0, 11.0))))
    # Of 10 and 5 rows, 7.5 sequences decline; all 15 rows go deeper.
    assert deferral.rate(1, 10, 2) == pytest.approx(
        15.0 / (8.5 + (2.0 + 1.5) + (1.0 + 0.75)), rel=0.01
    )


def test_tokens_per_second_with_another_exit_before_or_after() -> None:
    """Three segments, 8 sequences; half decline the first exit, and half of those the second."""
    profile = LatencyProfile((0, 100), ((1.0, 1.0), (2.0, 12.0), (4.0, 24.0)))
    deferral = _deferral(profile, 0.5, 0.5)
    # Of 8 and then 4 rows, all pass the second segment, half of them the third.
    after = (8 + 4) / (2 * 1.0 + (2.0 + 1.2) + (4.0 + 0.2 * 6))
    assert deferral.rate(1, 8, 2) == pytest.approx(after, rel=0.01)
    # A quarter reaches the third segment: of 8 and then 6 rows, half pass the second each time.
    before = (8 + 6) / (2 * 1.0 + (2.0 + 0.4) + (2.0 + 0.3) + (4.0 + 0.2 * 14))
    assert deferral.rate(2, 8, 2) == pytest.approx(before, rel=0.01)


def test_an_exit_that_is_off_joins_its_segment_with_the_next() -> None:
    """Every row continues, and its head costs nothing."""
    passes = LatencyProfile((0, 100), ((1.0, 11.0), (1.0, 11.0), (2.0, 22.0)))
    heads = LatencyProfile((0, 100), ((7.0, 7.0), (1.0, 11.0), (1.0, 11.0)))
    joined = LatencyProfile((0, 100), ((2.0, 22.0), (2.0, 22.0)))
    deferral = Deferral(passes, heads, 8)
    for _ in range(4000):
        deferral.observe(0, [], 1)
        deferral.observe(1, [True])
        deferral.observe(1, [False])
    assert deferral.rates == pytest.approx([1.0, 0.5], abs=0.01)
    expected = _deferral(joined, 0.5, heads=LatencyProfile((0, 100), ((1.0, 11.0), (1.0, 11.0))))
    for num_passes in (1, 2, 5):
        rate = expected.rate(1, 8, num_passes)
        assert deferral.rate(2, 8, num_passes) == pytest.approx(rate, rel=0.02)


def test_measured_latencies_correct_the_profile() -> None:
    """Deep passes take three times as long as in the profile, because their rows have a context."""
    passes = LatencyProfile((0, 100), ((1.0, 11.0), (2.0, 22.0)))
    heads = LatencyProfile((0, 100), ((1.0, 11.0), (1.0, 11.0)))
    deferral = _deferral(passes, 0.5, heads=heads)
    plain = deferral.rate(1, 10, 2)
    for _ in range(4000):
        deferral.record_latency([(0, 10)], 10, 2.0 + 2.0)
        deferral.record_latency([(1, 20)], 5, 3 * (6.0 + 1.5))
    seconds = 7.0 + 3 * (5.0 + 1.75)
    assert deferral.rate(1, 10, 2) == pytest.approx(15.0 / seconds, rel=0.01)
    assert plain == pytest.approx(15.0 / (7.0 + 5.0 + 1.75), rel=0.01)


def test_one_delayed_pass_does_not_outweigh_the_others() -> None:
    deferral = _deferral(_constant(1.0, 1.0), 0.3)
    for _ in range(100):
        deferral.record_latency([(1, 4)], 0, 1.0)
    before = deferral.rate(1, 16, 2)
    deferral.record_latency([(1, 4)], 0, 1e6)
    assert deferral.rate(1, 16, 2) == pytest.approx(before, rel=0.05)


def _closed_form(ratio: float, q: float, passes: int) -> float:
    """Return the speed-up of one deep pass (d) per k shallow ones (a) over one per shallow one.

    It is (1 - (1 - q)^k) / q * (a + d) / (k a + d), with `ratio` = (a + d) / a.
    """
    return (1.0 - (1.0 - q) ** passes) / q * ratio / (passes + ratio - 1.0)


@pytest.mark.parametrize("passes", [1, 2, 4, 9])
@pytest.mark.parametrize("q", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("a", "d"), [(1.0, 1.0), (1.0, 3.0), (0.5, 0.25)])
def test_constant_latencies_give_the_closed_form(a: float, d: float, q: float, passes: int) -> None:
    profile = _constant(a, d)
    deferral = _deferral(profile, q)
    gain = deferral.rate(1, 16, passes) / deferral.rate(1, 16, 1)
    assert gain == pytest.approx(_closed_form((a + d) / a, deferral.rates[0], passes))


@pytest.mark.parametrize(
    ("ratio", "q", "gain"), [(2, 0.1, 1.38), (2, 0.3, 1.13), (4, 0.1, 2.09), (4, 0.3, 1.46)]
)
def test_targets_maximize_the_closed_form(ratio: int, q: float, gain: float) -> None:
    """The target is a number of sequences, out of a hundred that run."""
    assert max(_closed_form(ratio, q, k) for k in range(1, 13)) == pytest.approx(gain, abs=0.01)
    deferral = _deferral(_constant(1.0, ratio - 1.0), q, max_deferred_steps=12)
    (measured,) = deferral.rates
    best = max(range(1, 13), key=lambda k: _closed_form(ratio, measured, k))
    assert best > 1
    assert deferral.targets(100) == [1, round(100 * (1.0 - (1.0 - measured) ** best))]


@pytest.mark.parametrize(
    ("profile", "declining"),
    [
        (_linear(1.0, 3.0), 0.1),  # bound by rows: waiting saves nothing
        (_constant(1.0, 0.1), 0.3),  # the deep pass is cheap
        (_constant(1.0, 3.0), 1.0),  # every row declines, so there is no other work
    ],
)
def test_rows_are_not_deferred_where_it_does_not_pay(
    profile: LatencyProfile, declining: float
) -> None:
    assert _deferral(profile, declining).targets(16) == [1, 1]


def test_a_speedup_below_a_tenth_does_not_justify_deferral() -> None:
    for deep, is_worth in ((0.8, False), (1.2, True)):
        deferral = _deferral(_constant(1.0, deep), 0.3)
        gains = [_closed_form(1.0 + deep, deferral.rates[0], passes) for passes in range(1, 9)]
        assert (1.05 < max(gains) < 1.1) != is_worth
        assert (deferral.targets(16)[1] > 1) == is_worth


def test_targets_respect_max_deferred_steps() -> None:
    profile = _constant(1.0, 30.0)
    deferral_targets = [
        _deferral(profile, 0.05, max_deferred_steps=limit).targets(1000)[1] for limit in (1, 2, 8)
    ]
    assert deferral_targets[0] == 1
    assert deferral_targets[1] == pytest.approx(1000 * (1 - 0.95**2), rel=0.2)
    assert deferral_targets[2] == pytest.approx(1000 * (1 - 0.95**8), rel=0.2)


def test_targets_of_deeper_segments_follow_their_own_share() -> None:
    profile = _constant(1.0, 4.0, 20.0)
    deferral = _deferral(profile, 0.4, 0.5)
    first, second = deferral.rates
    for segment, share in ((1, first), (2, first * second)):
        best = max(range(1, 9), key=lambda k, segment=segment: deferral.rate(segment, 100, k))
        assert best > 1
        assert deferral.targets(100)[segment] == round(100 * (1.0 - (1.0 - share) ** best))


def test_rates_are_a_moving_average_for_each_exit() -> None:
    """The latest result has weight 1, each earlier one 0.98 of the next; the start value is 0.5."""
    deferral = Deferral(_constant(1.0, 1.0, 1.0), _constant(0.0, 0.0, 0.0), 4)
    assert deferral.rates == [0.5, 0.5]
    deferral.observe(0, [False, True, False])
    total = 0.98**3 + 0.98**2 + 0.98 + 1.0
    assert deferral.rates[0] == pytest.approx((0.5 * 0.98**3 + 0.98**2 + 1.0) / total)
    assert deferral.rates[1] == 0.5
    for _ in range(2000):
        deferral.observe(1, [True])
    assert deferral.rates[1] == pytest.approx(0.0, abs=1e-9)
    for _ in range(50):
        deferral.observe(1, [False])
    assert deferral.rates[1] == pytest.approx(1.0 - 0.98**50, abs=1e-6)
