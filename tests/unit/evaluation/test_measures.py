"""Confidences of a pass over given text against the reference model, for every measure."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.architecture.tensors import take_tensors
from ee_llm.data.windows import TargetWindow
from ee_llm.evaluation.measure import COLUMNS, measure
from ee_llm.inference.choices import MEASURES
from ee_llm.inference.execution.teacher_forced import TeacherForced
from ee_llm.inference.verification.confidences import RowConfidences, walk_exits
from tests.unit.inference.models import random_gates, random_tensors, random_tokens, tiny_config

EXITS = (1, 2, 3)


class Kept:
    """A collector that keeps everything."""

    def __init__(self) -> None:
        self.columns: dict[int, list[Tensor]] = {}
        self.hidden: dict[int, list[Tensor]] = {}

    def add_hidden(self, hidden: dict[int, Tensor]) -> None:
        for boundary, rows in hidden.items():
            self.hidden.setdefault(boundary, []).append(rows)

    def add(self, columns: dict[int, Tensor]) -> None:
        for boundary, found in columns.items():
            self.columns.setdefault(boundary, []).append(found)

    def check(self, num_windows: int) -> None:
        pass

    def result(self) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("head", [("norm",), ("block", "mlp", "translator", "norm")])
@pytest.mark.parametrize("name", MEASURES)
def test_confidences_equal_the_reference(name: Any, head: tuple[str, ...]) -> None:
    """As if every exit were on, which is what the search of thresholds assumes."""
    config = tiny_config(boundaries=EXITS, head=head)
    tensors = random_tensors(config, 3) | random_gates(config, 3)
    model = TeacherForced(config, take_tensors(config, tensors, torch.float64), 16)
    tokens, kept = random_tokens(17, 1), Kept()
    measure(model, config, [tokens], kept, confidence=name, max_logits=200)
    reference = ReferenceModel(config, tensors, torch.float64)
    measured = RowConfidences(name, 16, reference.gate)
    rows = torch.arange(16)
    for exit in walk_exits(reference, tokens[:-1], None, EXITS):
        logits = reference.logits(exit.boundary, exit.hidden)
        values = [
            one.value for one in measured.at(exit.boundary, exit.x, exit.before, rows, logits)
        ]
        expected = torch.tensor(values, dtype=torch.float64)
        found = torch.cat(kept.columns[exit.boundary], dim=1)[COLUMNS.index("confidence")]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(kept.hidden[exit.boundary][0], exit.x, rtol=1e-9, atol=1e-9)
    final = torch.cat(kept.columns[4], dim=1)
    assert torch.equal(final[COLUMNS.index("agreement")], torch.ones(16).double())
    top = reference.forward(tokens[:-1])[4].argmax(dim=-1)
    hits = (top == tokens[1:]).double()
    assert torch.equal(final[COLUMNS.index("accuracy")], hits)


def test_only_targets_count() -> None:
    config = tiny_config(boundaries=EXITS)
    tensors = take_tensors(config, random_tensors(config), torch.float64)
    tokens, whole, kept = random_tokens(9), Kept(), Kept()
    is_target = torch.arange(8) >= 5
    model = TeacherForced(config, tensors, 16)
    assert measure(model, config, [tokens], whole)[0] == 8
    assert measure(model, config, [TargetWindow(tokens, is_target)], kept)[0] == 3
    for boundary, columns in whole.columns.items():
        torch.testing.assert_close(kept.columns[boundary][0], columns[0][:, 5:])
        if boundary in EXITS:
            assert torch.equal(kept.hidden[boundary][0], whole.hidden[boundary][0][5:])
