"""Test the structure of the documentation: links, openings and the map of packages."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.test_import_rules import RULES

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *DOCS]
KINDS = {"tutorials", "how-to", "reference", "explanation"}


def load_tool(name: str) -> ModuleType:
    """Import a script of tools/docs, which is not a package."""
    path = ROOT / "tools" / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def links() -> list[pytest.param]:
    return [
        pytest.param(page, link, id=f"{name_of(page)} {link}")
        for page in PAGES
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
        if not link.startswith("http")
    ]


@pytest.mark.parametrize(("page", "link"), links())
def test_link_targets_exist(page: Path, link: str) -> None:
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    assert target.exists()
    if heading:
        found = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^a-z0-9_ -]", "", h.lower()).replace(" ", "-") for h in found]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_have_no_placeholders(page: Path) -> None:
    assert not re.search(r"^[A-Z_]{4,}$|TODO|FIXME", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_pages_open_with_a_purpose_and_a_command(page: Path) -> None:
    opening = page.read_text().partition("\n## ")[0]
    assert opening.startswith("# ")
    assert "```" in opening


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_pages_end_with_related_pages(page: Path) -> None:
    _, heading, related = page.read_text().rpartition("See also")
    assert heading
    assert len(re.findall(r"\]\(", related)) >= 2


def test_every_page_has_a_kind_and_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in DOCS:
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or (name.split("/")[0] in KINDS and f"({name})" in index), name


def test_architecture_page_agrees_with_the_packages_and_their_import_rules() -> None:
    page = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
    table = page.partition("## Packages")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \|(.*)\|$", table, re.MULTILINE))
    assert rows.keys() == {path.parent.name for path in (ROOT / "ee_llm").glob("*/__init__.py")}
    allowed = {rule.where: rule.ours for rule in RULES if rule.ours is not None}
    for package, shown in rows.items():
        if package in allowed and not shown.strip().startswith("all "):
            names = set(re.sub(r"\(.*\)", "", shown).replace(",", " ").split())
            assert names == set(allowed[package]) & rows.keys(), package


def test_generation_picture_shows_every_token() -> None:
    """Otherwise, a token could be counted in the legend but not be shown."""
    record = {
        "prompt": "a b\n",
        "pieces": ["    ", "x", "\n", "y<z"],
        "exits": [2, 4, 2, 8],
        "num_layers": 8,
        "policy": {"thresholds": {"2": 0.5, "4": None}},
        "mean_depth": 4.0,
    }
    generation = load_tool("generation")
    picture = generation.draw(record)
    colors = generation.colors(record)
    assert [picture.count(f'fill="{colors[depth]}"') for depth in (2, 4, 8)] == [3, 2, 2]
    assert "y&lt;z" in picture
    assert "exit 2: 50% of tokens" in picture


def test_api_page_is_up_to_date() -> None:
    """After a change of public signatures or docstrings, run python tools/docs/api.py."""
    api = load_tool("api")
    assert api.PAGE.read_text(encoding="utf-8") == api.page()


def test_api_page_renders_google_sections() -> None:
    def sample(rows: int, *, dtype: str = "auto") -> list[int]:
        """Return the ids of some rows.

        Args:
            rows: Number of rows, on two
                lines.
            dtype: Precision.

        Returns:
            A list.

        After the sections.
        """
        raise NotImplementedError

    api = load_tool("api")
    assert api.ApiPage().signature("sample", sample) == (
        'sample(rows: int, *, dtype: str = "auto") -> list[int]'
    )
    assert api.docstring_text(sample.__doc__) == (
        "Return the ids of some rows.\n\n**Args**\n\n- `rows`: Number of rows, on two lines.\n"
        "- `dtype`: Precision.\n\n**Returns:** A list.\n\nAfter the sections."
    )
