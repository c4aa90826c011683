"""Test that the tables in the documentation of inference agree with the code."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ee_llm.inference.scheduling.deferral import Deferral, LatencyProfile
from ee_llm.inference.verification.certificate import tolerance

DOCS = Path(__file__).resolve().parents[3] / "docs"
EXPLANATION = (DOCS / "explanation" / "inference.md").read_text()
REFERENCE = (DOCS / "reference" / "generation.md").read_text()
ROWS = re.findall(r"^\| (1/\d) \| (.*) \|$", EXPLANATION, re.MULTILINE)


def _speedups(profile: LatencyProfile, q: float) -> list[float]:
    """Return S(k) for k = 1, 2, ...; both passes together cost 1, without the head."""
    deferral = Deferral(profile, LatencyProfile((1,), ((0.0,), (0.0,))), 24)
    deferral._arrived, deferral._declined = [1.0], [q]
    return [deferral.rate(1, 1, passes) for passes in range(1, 25)]


def _best(speedups: list[float]) -> str:
    return f"{max(speedups):.2f}, k = {speedups.index(max(speedups)) + 1}"


@pytest.mark.parametrize(("share", "cells"), ROWS, ids=[f"{a} {b[:3]}" for a, b in ROWS])
def test_deferral_table_equals_the_engines_estimates(share: str, cells: str) -> None:
    shallow = float(Fraction(share))
    q, saved, without, best, with_head, compute_bound = cells.split(" | ")
    deep, rows = 1.0 - shallow, float(q)
    assert saved == f"{1 / (shallow + rows * deep):.2f}"
    speedups = _speedups(LatencyProfile((1,), ((shallow,), (deep,))), rows)
    assert (without, best) == (f"{speedups[0]:.2f}", _best(speedups))
    assert with_head == _best(_speedups(LatencyProfile((1,), ((shallow + 0.1,), (deep,))), rows))
    linear = LatencyProfile((0, 1), ((0.0, shallow), (0.0, deep)))
    assert {compute_bound} == {f"{one:.2f}" for one in _speedups(linear, rows)}


def test_deferral_table_has_all_rows() -> None:
    assert len(ROWS) == 6


def test_tolerances_equal_those_of_the_certificate() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        (row,) = re.findall(
            rf"^\| {name} \| ([\d.e-]+)[^|]* \| ([\d.e-]+)[^|]* \|$", REFERENCE, re.M
        )
        allowed = tolerance(dtype)
        assert [float(one) for one in row] == pytest.approx([allowed.token, allowed.exit], rel=0.01)
