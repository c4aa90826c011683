"""Actions and plans as data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_llm.pipeline import Action, Op, Visit, forward_only, one_f_one_b
from ee_llm.pipeline.plan import step_grid

sizes = st.integers(1, 9)


@given(st.integers(0, 99), st.sampled_from(Op), st.integers(0, 9999))
def test_action_parses_as_it_prints(stage, op, microbatch):
    action = Action(stage, op, microbatch)
    assert Action.parse(str(action)) == action


def test_action_prints_stage_operation_and_microbatch():
    assert str(Action(2, Op.FORWARD, 0)) == "2F0"
    assert str(Action(3, Op.SEND_BACKWARD, 12)) == "3SB12"
    assert f"{[Action(2, Op.RECV_FORWARD, 1)]}" == "[2RF1]"


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0 ", "-1F0", "2FB0", "2f0"])
def test_other_text_is_not_an_action(text):
    with pytest.raises(ValueError, match=r"is not an action.*as in 2F0"):
        Action.parse(text)


@given(sizes, sizes)
def test_one_f_one_b_does_all_work_once_and_keeps_the_order_of_microbatches(stages, microbatches):
    plan = one_f_one_b(stages, microbatches)
    assert plan.stage_ranks == tuple(range(stages))
    assert plan.num_microbatches == microbatches
    for stage, actions in enumerate(plan.ranks):
        for op in (Op.FORWARD, Op.BACKWARD):
            mine = [a for a in actions if a.op is op]
            assert mine == [Action(stage, op, m) for m in range(microbatches)]
        assert len(actions) == 2 * microbatches


@given(sizes, sizes)
def test_one_f_one_b_alternates_after_its_warm_up(stages, microbatches):
    """The bound on live activations depends on the number of forwards ahead."""
    for stage, actions in enumerate(one_f_one_b(stages, microbatches).ranks):
        ops = "".join(action.op for action in actions)
        ahead = min(stages - 1 - stage, microbatches)
        assert ops == "F" * ahead + "FB" * (microbatches - ahead) + "B" * ahead


def test_forward_only_has_no_backward():
    plan = forward_only(2, 3)
    assert [[str(a) for a in actions] for actions in plan.ranks] == [
        ["0F0", "0F1", "0F2"],
        ["1F0", "1F1", "1F2"],
    ]
    assert plan.visits == (Visit(2, 2),) * 3
    assert not any(plan.has_backward(action) for action in plan.ranks[0])


@pytest.mark.parametrize("build", [one_f_one_b, forward_only])
def test_empty_plans_are_errors(build):
    with pytest.raises(ValueError, match="num_stages = 0"):
        build(0, 4)
    with pytest.raises(ValueError, match="num_microbatches = -1"):
        build(2, -1)


def test_neighbours_end_where_the_visit_ends():
    plan = one_f_one_b(3, 1)
    parse = Action.parse
    assert plan.dependencies(parse("0F0")) == ()
    assert plan.dependencies(parse("1F0")) == (parse("0F0"),)
    assert plan.dependencies(parse("2B0")) == (parse("2F0"),)
    assert plan.dependencies(parse("1B0")) == (parse("1F0"), parse("2B0"))
    assert plan.target(parse("1F0")) == parse("2F0")
    assert plan.target(parse("2F0")) is None
    assert plan.target(parse("0B0")) is None


def test_step_grid_shows_the_marked_place_and_its_surroundings():
    ranks = one_f_one_b(2, 8).ranks
    assert step_grid(ranks, [(1, 7)], around=2) == "\n".join(
        [
            " step   5   6    7    8   9",
            "rank 0 0F3 0B2  0F4  0B3 0F5",
            "rank 1 1B2 1F3 >1B3< 1F4 1B4",
        ]
    )
    assert ">end<" in step_grid(ranks, [(0, 16)])


def test_plans_need_no_torch():
    code = "import sys, ee_llm.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_examples_of_the_documentation_print_what_it_shows(capsys):
    page = Path(__file__).parents[3] / "docs" / "explanation" / "pipeline.md"
    first, second = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(first, {})
    assert f"```\n{capsys.readouterr().out}```" in page.read_text()
    names = {}
    exec(second, names)
    for label, name in (("naive", "naive"), ("deferred", "exits")):
        found = names[name]
        row = (
            f"| {found.makespan} | {' '.join(map(str, found.peak_exit_logits))} "
            f"| {' '.join(map(str, found.peak_activations))} |"
        )
        assert f"| + two exits, {label} {row}" in page.read_text()
