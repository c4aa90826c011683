"""The result as a table, as JSON and as a picture."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ee_llm.errors import RequestError
from ee_llm.evaluation.result import EvaluationResult, ExitMetrics


def make(margin: float | None = 0.25, loss: float = 3.5) -> EvaluationResult:
    error = None if margin is None else margin / 2
    share = None if margin is None else 0.01
    early = ExitMetrics(8, False, loss, error, margin, 0.42, share, share, 1.25, 0.31)
    final = ExitMetrics(24, True, 2.0, error, margin, 1.0, share, share, 0.0, 0.62)
    return EvaluationResult("runs/x", ("a.txt", "b.txt"), 12345, 512, "float32", (early, final))


def test_table_has_a_line_for_each_exit() -> None:
    lines = repr(make()).splitlines()
    assert lines[0] == "runs/x: 12,345 tokens of a.txt b.txt"
    assert lines[1].startswith("windows of 512 tokens, float32, loss in nats per token; ±")
    assert lines[-2].split() == [
        *("layer", "8", "3.5000", "±", "0.2500", "33.12"),
        *("42.0", "±", "1.0", "%", "1.2500", "0.310"),
    ]
    assert "layer 24 (final)" in lines[-1]
    assert len({len(line) for line in lines[3:]}) == 1, "the columns are aligned"


def test_table_without_margins() -> None:
    assert "±" not in repr(make(None))


def test_json_has_all_figures() -> None:
    record = json.loads(json.dumps(make().to_dict(), allow_nan=False))
    assert record.keys() == {"checkpoint", "inputs", "num_tokens", "seq_length", "dtype", "exits"}
    assert record["inputs"] == ["a.txt", "b.txt"]
    assert record["exits"][0] == {
        "boundary": 8,
        "is_final": False,
        "loss": 3.5,
        "loss_error": 0.125,
        "loss_margin": 0.25,
        "agreement": 0.42,
        "agreement_error": 0.01,
        "agreement_margin": 0.01,
        "kl_to_final": 1.25,
        "confidence": 0.31,
        "perplexity": pytest.approx(math.exp(3.5)),
    }


def test_perplexity_of_a_huge_loss_is_infinite_and_valid_json() -> None:
    result = make(loss=1000.0)
    assert result.exits[0].perplexity == math.inf
    assert (
        json.loads(json.dumps(result.to_dict(), allow_nan=False))["exits"][0]["perplexity"] is None
    )
    assert EvaluationResult.from_dict(result.to_dict()) == result


def test_exits_by_boundary() -> None:
    result = make()
    assert result.exit(8) is result.exits[0]
    assert result.final is result.exit(24)
    with pytest.raises(RequestError, match=r"boundary = 9 has no exit. Use one of 8, 24"):
        result.exit(9)


@pytest.mark.parametrize("margin", [0.25, None])
def test_pictures_are_written(tmp_path: Path, margin: float | None) -> None:
    svg, again, png = tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.PNG"
    for path in (svg, again, png):
        make(margin).save_plot(path)
    words = "".join(ET.parse(svg).getroot().itertext())
    for expected in ("loss (nats per token)", "agreement with the final exit (%)", "12,345 tokens"):
        assert expected in words
    assert ("95 % confidence" in words) == (margin is not None)
    assert svg.read_bytes() == again.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"plot = .*a\.jpg is not a picture"):
        make().save_plot(tmp_path / "a.jpg")
