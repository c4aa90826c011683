"""The trace of a real step has the format of a predicted one."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from ee_llm.architecture.partition import exit_stage
from ee_llm.pipeline import Op
from ee_llm.pipeline.selection import select_plan
from tests.distributed.runs import layout, losses_of, make_config, train_ranks

SCHEDULES = {
    "1f1b": layout(1, 2),
    "interleaved": layout(1, 2) | {"parallel.virtual": 2},
    "zb-h1": layout(1, 2) | {"parallel.schedule": "zero-bubble"},
    "filled": layout(1, 3)
    | {
        "parallel.layer_split": (1, 1, 2),
        "parallel.fill_warmup": 1,
        "parallel.fill_cooldown": 1,
    },
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_configured_steps_are_traced(tmp_path, corpus, schedule):
    options = {"training.steps": 3, **SCHEDULES[schedule]}
    size = SCHEDULES[schedule]["parallel.pipeline"]
    config = make_config(tmp_path / "traced", corpus, **options | {"logging.trace_steps": (2, 3)})
    train_ranks(size, config)
    assert sorted(path.name for path in (tmp_path / "traced").glob("trace-*")) == [
        "trace-00000002.json",
        "trace-00000003.json",
    ]
    num_ordinary = config.num_microbatches(size)
    plan = select_plan(config, num_ordinary)
    trace = json.loads((tmp_path / "traced" / "trace-00000002.json").read_text())
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    events = [event for event in slices if event["cat"] != "exit"]
    assert Counter(event["name"] for event in events) == Counter(str(a) for a in plan.work)
    for event in events:
        filling = event["args"]["microbatch"] >= num_ordinary
        assert event["cat"].startswith("filling") == filling
    for rank, actions in enumerate(plan.ranks):
        mine = sorted((e for e in events if e["tid"] == rank), key=lambda event: event["ts"])
        assert [event["name"] for event in mine] == [str(action) for action in actions]
        assert all(event["dur"] > 0 for event in mine if not event["name"].count(Op.WEIGHT))
        for one, other in pairwise(mine):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-3  # microseconds
    by_name = {event["name"]: event for event in events}
    exits = [event for event in slices if event["cat"] == "exit"]
    with_exits = {exit_stage(config, b) for b in (*config.exits.boundaries, 4)}
    assert {event["name"] for event in exits} == {
        f"exits of {a}" for a in plan.work if a.op is Op.BACKWARD and a.stage in with_exits
    }
    for event in exits:
        action = by_name[event["name"].removeprefix("exits of ")]
        assert event["ts"] == action["ts"]
        assert 0 < event["dur"] < action["dur"]
    ends = {event["name"]: event["ts"] + event["dur"] for event in events}
    last = f"{plan.num_stages - 1}"
    assert ends["0F0"] < ends[f"{last}F0"] < ends[f"{last}B0"] < ends["0B0"]  # the clocks agree
    # Tracing does not change a step.
    train_ranks(size, make_config(tmp_path / "plain", corpus, **options))
    assert losses_of(tmp_path / "traced") == losses_of(tmp_path / "plain")
