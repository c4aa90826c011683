"""The page of a report: its numbers, its escaping, and that it loads nothing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import ee_llm
from ee_llm.errors import RequestError, UserError
from ee_llm.evaluation.reliability import ReliabilityBin, calibration_error
from ee_llm.evaluation.report.charts import reliability_svg
from ee_llm.evaluation.report.content import gather
from ee_llm.evaluation.report.options import ReportOptions
from ee_llm.evaluation.report.page import page_of
from ee_llm.evaluation.sweep.result import SweepResult
from tests.unit.evaluation.models import write_texts
from tests.unit.evaluation.sweep.places import make_place

pytestmark = pytest.mark.thorough

TEXTS = ["<script>alert('x')</script> & more <b>text</b>. " * 8, "Then it runs away.\n" * 10]
# Attributes whose values a browser loads or links to.
LOADING = ("src", "href", "action", "data", "poster", "srcset", "xlink:href", "style")
VOID = ("meta", "link", "img", "br", "hr", "input")


class Page(HTMLParser):
    """The elements and texts of a page; checks that elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []  # ids that attributes refer to
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        for name, value in attrs:
            self.targets += re.findall(r"url\(#([^)]*)\)", value or "")
            if name == "href" and (value or "").startswith("#"):
                self.targets.append((value or "")[1:])
            if name == "id":
                self.ids.append(value or "")
            if name in LOADING:
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a sweep and a policy file of it, and hostile texts."""
    place = make_place(tmp_path_factory.mktemp("place"))
    write_texts(place / "hostile", TEXTS)
    options: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "rounds": 1}
    options |= {"thresholds": (0.15,), "draft_lengths": (2,), "dtype": "float64"}
    result = ee_llm.sweep(place / "run", ["<i>The</i>"], **options, progress=False)
    (place / "sweep.json").write_text(json.dumps(result.to_dict()))
    calibrated = ee_llm.calibrate(
        place / "run", text=place / "hostile", risk=0.6, delta=0.5, seq_length=8, dtype="float64"
    )
    calibrated.save(place / "policy.json")
    return place


def options_of(place: Path, **given: Any) -> dict[str, Any]:
    return {"text": place / "hostile", "seq_length": 16, "dtype": "float64"} | given


@pytest.fixture(scope="module")
def html(place: Path) -> str:
    options = options_of(place, sweep=place / "sweep.json", calibration=place / "policy.json")
    ee_llm.report(place / "run", place / "report.html", **options, max_tokens=8, num_samples=2)
    return (place / "report.html").read_text(encoding="utf-8")


def test_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|@import", html)
    for reference in page.references:
        assert "url(" not in reference.replace("url(#", "")


def test_ids_are_unique_and_their_targets_exist(html: str) -> None:
    """Equal shapes have equal ids in all figures of matplotlib."""
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    for figure in ("front-", "reliability-"):
        assert any(target.startswith(figure) for target in page.targets)
    assert set(page.targets) <= set(page.ids)


def test_points_of_reliability_diagrams_are_not_cut() -> None:
    """The largest marker lies at a corner, if an exit is always sure and right."""
    svg = reliability_svg({2: [ReliabilityBin(10, 1.0, 1.0)]}, "label")
    (group,) = re.findall(r"<g([^>]*)>\s*<use [^>]*fill-opacity: 0.8", svg)
    assert "clip-path" not in group


def test_page_has_its_sections_once(html: str) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        *("What to set", "Model", "Exits", "Confidence", "Speed and agreement", "Depth", "Samples")
    ]
    page = Page(html)
    assert page.tags.count("svg") == 2
    assert html.count('role="img" aria-label="') == 2
    assert '<html lang="en">' in html
    assert "prefers-color-scheme: dark" in html


def test_texts_are_escaped(html: str) -> None:
    """Prompts come from the text, which may be hostile."""
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html
    assert "<b>" not in html


def test_numbers_equal_those_of_evaluate(place: Path, html: str) -> None:
    result = ee_llm.evaluate(place / "run", **options_of(place))
    rows = {row[0]: row for row in Page(html).rows if len(row) == 7 and row[0].startswith("layer")}
    assert len(rows) == 3
    content = gather(
        ReportOptions(
            place / "run", text=(place / "hostile",), seq_length=16, dtype="float64", num_samples=0
        )
    )
    assert content.evaluation == result
    for one in result.exits:
        row = rows[f"layer {one.boundary}" + (" (final)" if one.is_final else "")]
        assert row[1:3] == [f"{one.loss:.4f}", f"{one.perplexity:.4g}"]
        assert row[3].startswith(f"{one.agreement:.1%}")
        assert row[4:6] == [f"{one.kl_to_final:.4f}", f"{one.confidence:.3f}"]
        if not one.is_final:
            bins = content.reliability[one.boundary]
            count = sum(each.num_tokens for each in bins)
            assert count == result.num_tokens
            mean = sum(each.num_tokens * each.agreement for each in bins) / count
            assert mean == pytest.approx(one.agreement)
            assert row[6] == f"{calibration_error(bins):.3f}"


def test_sweep_and_commands_are_shown(place: Path, html: str) -> None:
    sweep = SweepResult.from_dict(json.loads((place / "sweep.json").read_text()))
    texts = "".join(Page(html).texts)
    assert sweep.command() in texts
    assert f"--policy {place / 'policy.json'}" in texts
    names = [row[0] for row in Page(html).rows if row]
    for point in sweep.points:
        assert any(name.startswith(point.name) for name in names)


def test_page_without_results_says_how_to_get_them(place: Path, tmp_path: Path) -> None:
    ee_llm.report(place / "run", tmp_path / "a.html", **options_of(place), num_samples=0)
    texts = "".join(Page((tmp_path / "a.html").read_text()).texts)
    assert f"ee-llm sweep {place / 'run'} --text {place / 'hostile'} --json sweep.json" in texts
    assert f"ee-llm calibrate {place / 'run'}" in texts
    assert "Speed and agreement" not in texts
    assert "Samples" not in texts


HOSTILE = """<img src=x onerror="alert('$x_{$ $y$')"> url(#a) id="a_1" & """


def test_texts_of_result_files_are_escaped_and_shown_as_they_are(
    place: Path, tmp_path: Path
) -> None:
    """They come from files, and matplotlib reads dollar signs as formulas."""
    record = json.loads((place / "sweep.json").read_text())
    record |= {"checkpoint": HOSTILE, "inputs": [HOSTILE, HOSTILE]}
    record["points"][1] |= {"name": HOSTILE, "speedup": 9.0, "speedup_low": 9.0, "agreement": 1.0}
    record["points"][1] |= {"agreement_high": 1.0, "paired_speedups": [9.0] * 10}
    assert record["points"][1]["family"] == "thresholds"
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    options = options_of(place, sweep=tmp_path / "sweep.json", num_samples=1, max_tokens=1)
    ee_llm.report(place / "run", tmp_path / "a.html", **options)
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<img" not in html
    page = Page(html)
    assert "img" not in page.tags
    texts = "".join(page.texts)
    assert f"recommended: {HOSTILE.strip()}" in texts, "the figure"
    assert f"Recommended: {HOSTILE}, 9.00 times as fast" in texts, "the advice"
    assert f"prompts of {HOSTILE} {HOSTILE}, up to" in texts, "the caption of the table"
    assert f"the recommended point of the sweep, {HOSTILE} (strategy exact" in texts, "the samples"


def test_samples_use_the_strategy_of_the_sweep(place: Path, tmp_path: Path) -> None:
    """The approximation of propagate writes other texts than exact exits."""
    record = json.loads((place / "sweep.json").read_text())
    best = {"strategy": "propagate", "speedup": 9.0, "speedup_low": 9.0, "agreement": 1.0}
    record["points"][1] |= best | {"paired_speedups": [9.0] * 10}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    content = gather(
        ReportOptions(
            place / "run",
            text=(place / "hostile",),
            seq_length=16,
            dtype="float64",
            num_samples=1,
            sweep=tmp_path / "sweep.json",
        )
    )
    assert content.samples[0].strategy == "propagate"
    assert "(strategy propagate, max_probability:" in page_of(content)


@pytest.mark.parametrize("case", ["output", "prompts"])
def test_mistakes_are_found_before_the_text_is_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A pass over a large text takes hours."""

    def fail(*_: Any) -> None:
        raise AssertionError("the evaluation has begun")

    monkeypatch.setattr("ee_llm.evaluation.report.content.run_pass", fail)
    if case == "output":
        with pytest.raises(UserError, match="output .*gone/a.html: the folder .*gone does not ex"):
            ee_llm.report(place / "run", place / "gone" / "a.html", **options_of(place))
    else:
        with pytest.raises(UserError, match="too short for num_prompts = 90 prompts"):
            ee_llm.report(place / "run", place / "a.html", **options_of(place, num_samples=90))


MALFORMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no points": ("sweep", {"points": []}, r"points must begin with the full model"),
    "text": (
        "sweep",
        {"speedup": "1.5"},
        r'points\[1\].speedup = "1.5": input should be a valid n',
    ),
    "missing": ("sweep", {"loss": None}, r"points\[1\].loss is missing"),
    "shares": ("sweep", {"shares": [1.0]}, r"points\[1\] has 2 thresholds and 1 shares"),
    "boundaries": ("sweep", {"boundaries": [1, 4]}, r"for exits at \[1, 4\], but the model has"),
    "not finite": ("sweep", {"speedup": math.inf}, "has a number that is not finite"),
    "text risk": ("calibration", {"risk": "0.1"}, 'risk = "0.1": input should be a valid number'),
    "no delta": ("calibration", {"delta": None}, "delta is missing"),
    "metric": ("calibration", {"metric": "x"}, "metric = \"x\": input should be 'agreement', "),
    "few shares": (
        "calibration",
        {"shares": [1.0]},
        r"shares = \[1.0\] and thresholds = .* do not",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named_with_the_field(place: Path, tmp_path: Path, case: str) -> None:
    kind, changes, expected = MALFORMED[case]
    name = {"sweep": "sweep.json", "calibration": "policy.json"}[kind]
    record = json.loads((place / name).read_text())
    inner = record["calibration"] if kind == "calibration" else record
    for name, value in changes.items():
        where = inner if name in inner else record["points"][1]
        if value is None:
            del where[name]
        else:
            where[name] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(record))
    with pytest.raises(RequestError, match=f"{kind} = {path} is .*{expected}"):
        ee_llm.report(place / "run", tmp_path / "a.html", **options_of(place, **{kind: path}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other model": ({"sweep": "other.json"}, "is for the model with fingerprint 0000"),
    "no sweep": ({"sweep": "policy.json"}, r"policy\.json is not a result of a sweep"),
    "no file": ({"sweep": "gone.json"}, r"gone\.json cannot be read"),
    "no policy": ({"calibration": "sweep.json"}, r"Policy file sweep\.json"),
    "samples": ({"num_samples": -1}, "num_samples = -1 is out of range. Use 0 to 100"),
    "no exits": ({"model": "dense"}, "has no early exits to report on. Add some with"),
    "no text": ({"text": ()}, "there is no text to evaluate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_named(place: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(place)
    given, expected = REFUSED[case]
    record = json.loads(Path("sweep.json").read_text()) | {"fingerprint": "0000"}
    Path("other.json").write_text(json.dumps(record))
    options = options_of(place, **given)
    with pytest.raises(RequestError, match=expected):
        ee_llm.report(options.pop("model", "run"), "refused.html", **options)
    assert not Path("refused.html").exists()
