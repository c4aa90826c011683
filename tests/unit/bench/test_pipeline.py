"""Test the pipeline benchmark: simulated times, calculations, and a small real run."""

import json
import math

import pytest

from ee_llm.pipeline import lower
from tools.bench import pipeline as bench
from tools.bench import report
from tools.bench.ranks import run_ranks

M = 16


def by_name(num_ranks: int, num_microbatches: int = M) -> dict[str, bench.Schedule]:
    return {s.name: s for s in bench.schedules(num_ranks, num_microbatches, forward=1.0)}


def row(ranks: int, name: str, simulated: float, measured: float, bubble: float) -> bench.Row:
    ratio = measured / simulated
    return bench.Row(ranks, name, simulated, measured, ratio, ratio, ratio, bubble, bubble / 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_simulated_times_match_the_formulas(size):
    """The formulas are those of docs/reference/benchmarks.md with f = w = 1 and b = 2."""
    found = {name: s.simulation.makespan for name, s in by_name(size).items()}
    assert found["1F1B"] == pytest.approx(3 * (M + size - 1))
    assert found["interleaved"] == pytest.approx(3 * M + 3 * (size - 1) / 2)
    assert found["ZB-H1"] == pytest.approx(3 * M + size - 1)
    if size == 2:
        assert len(found) == 3
        return
    for part in ("warm-up", "cool-down", "both"):
        assert found[f"filled, {part}"] == pytest.approx(found["1F1B"])
    assert found[bench.FINAL] == pytest.approx(4.5 * M + 3 * (size - 1))
    assert found[bench.TWO_EXITS] == pytest.approx(found[bench.FINAL])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bubbles_match_the_formulas(size):
    found = {
        name: sum(s.simulation.bubble_share) * s.simulation.makespan
        for name, s in by_name(size).items()
    }
    bubble = 3 * size * (size - 1)
    assert found["1F1B"] == pytest.approx(bubble)
    assert found["interleaved"] == pytest.approx(bubble / bench.NUM_CHUNKS)
    assert found["ZB-H1"] == pytest.approx(bubble / 3)
    if size == 2:
        return
    fills = math.floor((size - 1) / 1.5)
    warmup = 3 * fills * (fills + 1) / 2
    cooldown = sum(size + 2 * math.floor(size - 1.5 * i) for i in range(1, fills + 1))
    assert found["filled, warm-up"] == pytest.approx(bubble - warmup)
    assert found["filled, cool-down"] == pytest.approx(bubble - cooldown)
    assert found["filled, both"] == pytest.approx(bubble - warmup - cooldown)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_schedule_is_valid_and_has_the_work_of_1f1b(size):
    found = by_name(size)
    for schedule in found.values():
        lower(schedule.plan)
    work = {
        name: (1 - sum(s.simulation.bubble_share) / size) * s.simulation.makespan
        for name, s in found.items()
    }
    for name in ("1F1B", "interleaved", "ZB-H1"):
        assert work[name] == pytest.approx(3 * M)


def test_makespan_is_from_first_start_to_last_end_over_all_ranks():
    ranks = [[(10.0, 11.0), (12.0, 14.0)], [(11.0, 12.0)]]
    assert bench.makespan(ranks) == 4.0
    assert bench.bubble_share(ranks) == pytest.approx(0.5)


def test_a_row_has_the_median_time_over_the_simulated_time():
    schedule = by_name(2, 2)["1F1B"]  # takes 9 in the simulation
    rounds = [[[(0.0, 6.0)], [(3.0, end)]] for end in (9.0, 12.0, 18.0)]
    found = bench.make_row(schedule, rounds)
    assert (found.ranks, found.schedule) == (2, "1F1B")
    assert (found.simulated, found.measured) == (9.0, 12.0)
    assert found.ratio == pytest.approx(12 / 9)
    assert (found.ratio_low, found.ratio_high) == pytest.approx((10.5 / 9, 15 / 9))
    assert found.bubble_simulated == pytest.approx(1 / 3)
    assert found.bubble_measured == pytest.approx(1 - 15 / 24)


def test_savings_are_relative_to_idle_time_not_to_bubble_shares():
    base = row(4, "1F1B", simulated=10.0, measured=20.0, bubble=0.2)
    half = row(4, "ZB-H1", simulated=8.0, measured=10.0, bubble=0.125)
    found = bench.with_savings(half, base)
    assert found.saved_simulated == pytest.approx(0.5)
    assert found.saved_measured == pytest.approx(1 - 0.625 / 2)
    assert found.ratio == half.ratio


def test_figures_have_the_worst_ratio_and_the_most_expensive_exits():
    rows = [
        row(4, "1F1B", 10.0, 10.2, 0.16),
        row(4, "ZB-H1", 10.0, 9.0, 0.06),
        row(8, "1F1B", 10.0, 10.9, 0.3),
        row(4, bench.FINAL, 10.0, 10.0, 0.1),
        row(4, bench.TWO_EXITS, 10.0, 10.1, 0.1),
        row(8, bench.FINAL, 20.0, 20.0, 0.1),
        row(8, bench.TWO_EXITS, 20.1, 20.0, 0.1),
    ]
    figures = bench.make_figures(rows)
    assert figures["measured_over_simulated_worst"] == 0.9
    assert figures["bubble_share_1f1b_p4"] == 0.16
    assert figures["bubble_share_zb_p4_measured"] == 0.03
    assert "bubble_share_interleaved_p4" not in figures
    assert figures["two_exit_step_ratio"] == pytest.approx(1.005)
    assert figures["two_exit_step_ratio_measured"] == pytest.approx(1.01)
    assert set(bench.make_figures(rows[:1])) == {
        "measured_over_simulated_worst",
        "bubble_share_1f1b_p4",
        "bubble_share_1f1b_p4_measured",
    }


def test_explicit_options_take_precedence_over_quick():
    assert report.read_options(bench.Options, bench.QUICK, []) == bench.Options()
    quick = report.read_options(bench.Options, bench.QUICK, ["--quick", "--ranks", "2", "4"])
    assert quick == bench.Options(**bench.QUICK | {"quick": True, "ranks": (2, 4)})


def test_two_ranks_execute_their_plans_and_compute_gradients():
    """With a few milliseconds of sleep, only completeness is checked, not the ratio of times."""
    wanted = bench.schedules(2, 4, forward=0.002)
    results = run_ranks(2, bench.run_schedules, wanted, 2)
    gradients = [result.gradients for result in results]
    for schedule in wanted:
        for result in results:
            assert len(result.spans[schedule.name]) == 2
            for spans in result.spans[schedule.name]:
                # Four microbatches take 2 + 4 ms each. A sleep can be longer, but not shorter.
                assert sum(end - start for start, end in spans) >= 4 * 0.006
        found = {stage: g for own in gradients for stage, g in own[schedule.name].items()}
        assert set(found) == set(range(schedule.plan.num_stages))
        assert all(any(values) for values in found.values())
    for own in gradients:
        assert own["ZB-H1"].keys() == own["1F1B"].keys()
        for stage, values in own["1F1B"].items():
            assert own["ZB-H1"][stage] == pytest.approx(values)


def test_the_json_file_has_all_rows_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run_ranks", _as_simulated)
    path = tmp_path / "pipeline.json"
    bench.main(bench.Options(json=path))
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "figures"}
    assert len(written["rows"]) == 3 + 8 + 8
    figures = written["figures"]
    assert figures["measured_over_simulated_worst"] == pytest.approx(1.0)
    assert figures["bubble_share_1f1b_p4"] == pytest.approx(3 / 19)
    assert figures["bubble_share_interleaved_p4"] == pytest.approx(1.5 / 17.5)
    assert figures["bubble_share_zb_p4"] == pytest.approx(1 / 17)
    assert figures["bubble_share_filled_p4"] == pytest.approx(13 / 228)
    assert figures["bubble_share_filled_p4_measured"] == pytest.approx(13 / 228)
    assert figures["two_exit_step_ratio"] <= 1.005
    saved = [r["saved_measured"] for r in written["rows"] if r["schedule"] == "ZB-H1"]
    assert saved == pytest.approx([2 / 3] * 3)


def _as_simulated(num_ranks, _function, wanted, num_rounds):
    # The results of ranks that take exactly the simulated time.
    def spans(schedule, rank):
        line = schedule.simulation.timeline.ranks[rank]
        return [[(span.start, span.end) for span in line]] * num_rounds

    return [
        bench.RankResult({s.name: spans(s, rank) for s in wanted}, {}) for rank in range(num_ranks)
    ]
