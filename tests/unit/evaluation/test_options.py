"""Arguments of the Python API that are one value or several."""

from pathlib import Path

import numpy as np
import pytest

from ee_llm.evaluation.options import listed, shown_inputs


@pytest.mark.parametrize("value", ["all", Path("a"), 8, 0.5, np.float64(0.5)])
def test_a_single_value_is_a_list_of_one(value: object) -> None:
    assert listed(value) == [value]


@pytest.mark.parametrize("values", [("a", Path("b")), [0.5, 1], [], range(2), np.array([2, 4])])
def test_several_values_keep_their_order(values: list[object]) -> None:
    assert listed(values) == [*values]


def test_none_is_empty() -> None:
    assert listed(None) == []


def test_titles_name_few_inputs() -> None:
    assert shown_inputs(["a", "b", "c"]) == "a b c"
    assert shown_inputs(["a", "b", "c", "d"]) == "a and 3 more"
