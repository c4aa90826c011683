"""Traces have the format of chrome://tracing and the times of the timeline."""

import json

import pytest

from ee_llm.pipeline import Action, Costs, PieceCost, StageCost, one_f_one_b, simulate
from ee_llm.pipeline.planner.trace import chrome_trace
from ee_llm.pipeline.simulate import Span

HEAD = (PieceCost(0.25, 0.5),)


def slices(trace):
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_trace_has_every_action_on_its_rank_in_microseconds():
    line = simulate(one_f_one_b(3, 4), Costs((StageCost(1, 2, HEAD),) * 3)).timeline
    trace = json.loads(json.dumps(chrome_trace(line.ranks, seconds=1e-3)))
    found = [(e["tid"], e["name"], e["cat"], e["ts"], e["dur"]) for e in slices(trace)]
    kinds = {"F": "forward", "B": "backward"}
    assert found == [
        (rank, str(s.action), kinds[s.action.op], 1e3 * s.start, 1e3 * (s.end - s.start))
        for rank, spans in enumerate(line.ranks)
        for s in spans
    ]
    names = [e for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert [(e["ph"], e["tid"], e["args"]["name"]) for e in names] == [
        ("M", rank, f"rank {rank}") for rank in range(3)
    ]
    assert slices(trace)[0]["args"] == {"stage": 0, "microbatch": 0}


def test_spans_from_clocks_start_at_zero_and_keep_their_distances():
    clock = 1e4  # seconds, of a clock that started long ago
    ranks = [
        [Span(Action.parse("0F0"), clock, clock + 1.0)],
        [Span(Action.parse("1F0"), clock + 1.5, clock + 2.0)],
    ]
    first, second = slices(chrome_trace(ranks))
    assert (first["ts"], first["dur"]) == (0, 1e6)
    assert (second["ts"], second["dur"]) == (1.5e6, 0.5e6)


def test_exits_are_slices_inside_their_action_and_fills_have_their_own_category():
    span = Span(Action.parse("1B3"), 2.0, 6.0)
    trace = chrome_trace([[], [span]], filling={3}, exit_part=lambda s: (s.start, s.start + 1))
    action, exits = slices(trace)
    assert action["cat"] == "filling backward"
    assert (exits["name"], exits["cat"], exits["tid"]) == ("exits of 1B3", "exit", 1)
    assert (exits["ts"], exits["dur"]) == (action["ts"], pytest.approx(1e6))


def test_empty_timeline_is_an_empty_trace():
    assert slices(chrome_trace([[], []])) == []
