"""Test the benchmark of accuracy: its statistics, its questions, and a run with a tiny model."""

import sys

import pytest
import torch

from ee_llm import LLM
from tests.unit.inference.chats import save_family
from tools.bench import decode_accuracy, report
from tools.bench.decode_accuracy import (
    GREEDY,
    INSTRUCTION,
    TASKS,
    Options,
    Question,
    Result,
    last_number,
    make_questions,
    make_rows,
    mcnemar,
    measure,
    paired_interval,
    strategies,
    wilson,
)


def test_wilson_interval():
    """The published example: 81 of 263 (Newcombe 1998, table I)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = wilson(0, 20)
    assert low == 0.0
    assert high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=1e-4)


def test_paired_interval_by_hand():
    """8 gained and 3 lost of 98: (9 - 4) / 100, and half of the width z sqrt(0.1275 / 100)."""
    half = 1.959964 * (0.1275 / 100) ** 0.5
    assert paired_interval(8, 3, 98) == pytest.approx((0.05 - half, 0.05 + half))
    assert paired_interval(0, 0, 98) == pytest.approx((-0.0277186, 0.0277186), abs=1e-6)
    assert paired_interval(3, 8, 98) == pytest.approx((-0.05 - half, -0.05 + half))


def test_mcnemar_by_hand():
    """1 of 5 changes: 2 (1 + 5) / 32."""
    assert mcnemar(1, 4) == mcnemar(4, 1) == 12 / 32
    assert mcnemar(0, 6) == 2 / 64
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", "12"),
        ("3 * 4 = 12", "12"),
        ("1 - 6 = -5", "-5"),
        ("It is 1,234 exactly", "1234"),
        ("about 2.5", "2.5"),
        ("none", None),
    ],
)
def test_the_last_number_is_the_answer(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.label)
def test_questions_differ_and_check_their_answers(task):
    pytest.importorskip("reasoning_gym")
    questions = make_questions(task, 30, seed=1)
    assert len({question.text for question in questions}) == 30
    for question in questions:
        right = [n for n in range(-100, 100) if question.is_answer(str(n))]
        expression = question.text.removesuffix(INSTRUCTION)
        expression = expression.partition(":")[2].partition("=")[0].partition(".")[0]
        assert right == [eval(expression)]
    with pytest.raises(ValueError, match=r"--num-questions 5000: 'sum of 2' has only 200 diff"):
        make_questions(TASKS[0], 5000, seed=1)


def test_missing_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        make_questions(TASKS[0], 1, seed=0)


def test_rows_compare_the_same_questions():
    questions = [Question(task, "", str.isdigit) for task in ("a", "a", "b", "b")]
    base = Result([True, False, True, False], 1, [10, 30], [1.0, 1.0])
    other = Result([False, True, True, True], 0, [5, 15], [1.0, 1.0])
    first, second = make_rows(questions, {GREEDY: base, "other": other})
    assert first["difference"] == 0.0
    assert (first["accuracy"], first["truncated"], first["tokens"]) == (0.5, 0.25, 40)
    assert (second["gained"], second["lost"], second["difference"]) == (2, 1, 0.25)
    assert second["accuracy_by_task"] == {"a": 0.5, "b": 1.0}
    assert second["speed_vs_greedy"] == 0.5


def test_all_strategies_answer_all_questions(tmp_path):
    """The answers do not depend on how questions are batched."""
    torch.set_num_threads(1)
    checkpoint = save_family(tmp_path / "run", "smollm-2")
    questions = [Question("a", f"How much is {n}?", lambda number: True) for n in range(3)]
    results = []
    with LLM(checkpoint, dtype="float32") as llm:
        sides = strategies(llm.config.model.num_layers)
        for batch in (1, 2):
            results.append(measure(llm, questions, sides, Options(max_tokens=4, batch=batch)))
    for name in sides:
        alone, together = (result[name] for result in results)
        assert len(alone.is_right) == len(alone.seconds) == 3
        assert len(together.seconds) == 2
        assert alone.is_right == together.is_right
        assert sum(alone.num_tokens) == sum(together.num_tokens) > 0


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="--batch 0 is less than 1"):
        decode_accuracy.main(Options(batch=0))
    quick = report.read_options(Options, decode_accuracy.QUICK, ["--quick", "--batch", "3"])
    assert quick == Options(**decode_accuracy.QUICK | {"quick": True, "batch": 3})
