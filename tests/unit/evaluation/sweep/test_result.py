"""The recommended point, the front, and the files of a result."""

import csv
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ee_llm.errors import RequestError
from ee_llm.evaluation.sweep.result import SweepPoint, SweepResult

FULL = SweepPoint(
    family="full",
    name="full",
    arguments=("--strategy", "full"),
    thresholds=(None, None),
    measure="max_probability",
    strategy="full",
    num_tokens=1000,
    agreement=1.0,
    agreement_low=0.996,
    agreement_high=1.0,
    loss=2.0,
    layers=24.0,
    heads=1.0,
    shares=(0.0, 0.0, 1.0),
    acceptance=None,
    ideal_speedup=1.0,
    speedup=1.0,
    speedup_low=1.0,
    speedup_high=1.0,
    tokens_per_second=50.0,
)


def point(name: str, speedup: float, agreement: float, **given: Any) -> SweepPoint:
    values: dict[str, Any] = {
        "family": "thresholds",
        "arguments": ("--thresholds", "0.8", "off"),
        "thresholds": (0.8, None),
        "strategy": "exact",
        "speedup_low": speedup - 0.05,
        "speedup_high": speedup + 0.05,
        "agreement_low": agreement - 0.02,
    }
    return replace(FULL, name=name, speedup=speedup, agreement=agreement, **{**values, **given})


def result(*points: SweepPoint) -> SweepResult:
    return SweepResult(
        checkpoint="runs/my model",
        fingerprint="0123456789abcdef",
        inputs=("prompts.jsonl",),
        num_layers=24,
        boundaries=(8, 16),
        head_cost=2.5,
        num_prompts=16,
        max_tokens=64,
        batch_size=1,
        rounds=4,
        dtype="float32",
        min_agreement=0.99,
        points=(FULL, *points),
    )


GOOD = point("good", 1.3, 0.992)
FASTER = point("faster", 1.6, 0.95)
DRAFT = point(
    "draft",
    1.2,
    1.0,
    family="self-speculative",
    arguments=("--strategy", "self-speculative", "--draft-exit", "8"),
    thresholds=(None, None),
    strategy="self-speculative",
    acceptance=0.7,
)
SLOW = point("slow", 0.9, 0.97)


def test_the_fastest_point_that_is_good_enough_is_recommended() -> None:
    assert result(FASTER, DRAFT, GOOD, SLOW).recommended is GOOD
    assert replace(result(FASTER, DRAFT, GOOD), min_agreement=0.995).recommended is DRAFT
    assert replace(result(FASTER, DRAFT, GOOD), min_agreement=0.9).recommended is FASTER


def test_front_has_the_points_that_none_beats() -> None:
    assert result(SLOW, DRAFT, FASTER, GOOD).front == (FASTER, GOOD, DRAFT)
    assert result(SLOW).front == (FULL,)


def test_advice_names_the_command() -> None:
    text = repr(result(FASTER, GOOD, SLOW))
    assert "Recommended: good, 1.30 times as fast as exits off, with 99.20% of tokens" in text
    assert "the agreement may be as low as 97.2%. Use more prompts" in text
    command = "ee-llm generate --checkpoint 'runs/my model' --thresholds 0.8 off"
    assert text.splitlines()[-1] == f"  {command}"


def test_the_luckiest_point_is_not_recommended() -> None:
    """On a busy machine, one of many points that are equally slow looks fast."""
    lucky = point("lucky", 1.25, 1.0, speedup_low=0.83)
    assert result(lucky, SLOW).recommended is FULL
    assert "lucky has a median speed-up of 1.25 and a first quartile of 0.83." in repr(
        result(lucky)
    )
    assert result(lucky, DRAFT).recommended is DRAFT


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((SLOW,), "exits off (nothing measured is faster than the full model)"),
        ((point("slow", 0.9, 1.0),), "exits off (nothing measured is faster than the full model)"),
        ((FASTER, SLOW), "exits off (no faster point agrees with the full model on 99% of tokens;"),
    ],
)
def test_exits_off_is_said_plainly(points: tuple[SweepPoint, ...], expected: str) -> None:
    found = result(*points)
    assert found.recommended is FULL
    assert expected in repr(found)
    assert repr(found).endswith("--checkpoint 'runs/my model' --strategy full")


def test_table_is_aligned_and_marks_the_front() -> None:
    lines = repr(result(FASTER, DRAFT, GOOD, SLOW)).splitlines()[3:9]
    assert len({len(line) for line in lines}) == 1
    assert [line[0] for line in lines[1:]] == [" ", "*", "*", "*", " "]


def test_result_survives_json() -> None:
    found = result(FASTER, DRAFT, point("absurd", 1.1, 0.1, loss=1e4))
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert SweepResult.from_dict(record) == found
    assert record["recommended"] == "draft"
    assert record["command"].endswith("--strategy self-speculative --draft-exit 8")
    assert record["points"][3]["perplexity"] is None


def test_names_with_dollar_signs_are_drawn(tmp_path: Path) -> None:
    """matplotlib reads what is between two of them as a formula."""
    found = result(point("policy $x_{$.json", 1.6, 0.95), point("policy $a$", 1.3, 0.992))
    found.save_plot(tmp_path / "a.svg")
    words = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext())
    assert "policy $x_{$.json" in words
    assert "recommended: policy $a$" in words


def test_csv_has_a_row_for_each_point(tmp_path: Path) -> None:
    found = result(FASTER, GOOD)
    found.save_csv(tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["full", "faster", "good"]
    assert [row["is_recommended"] for row in rows] == ["false", "false", "true"]
    assert [row["on_front"] for row in rows] == ["true", "true", "true"]
    assert rows[2]["arguments"] == "--thresholds 0.8 off"
    assert float(rows[2]["speedup"]) == 1.3
    assert float(rows[0]["share_24"]) == 1.0


def test_pictures_name_the_recommended_point(tmp_path: Path) -> None:
    svg, again, png = tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"
    for path in (svg, again, png):
        result(FASTER, DRAFT, GOOD, SLOW).save_plot(path)
    words = "".join(ET.parse(svg).getroot().itertext())
    for expected in ("recommended: good", "faster", "thresholds", "self-speculative", "speed-up"):
        assert expected in words
    assert "slow" not in words, "only points of the front are named"
    assert svg.read_bytes() == again.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RequestError, match="is not a picture"):
        result(GOOD).save_plot(tmp_path / "a.pdf")
