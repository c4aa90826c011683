"""Test the page at `/`: its files, that it loads nothing from elsewhere, and what it shows."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ee_llm.inference.llm import LLM
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.html import EXIT_COLORS, FINAL_COLOR
from ee_llm.serving.page.routes import PAGE_PATHS
from tests.unit.serving.browsers import CHROMIUM, Browser, browsing
from tests.unit.serving.servers import NAME, Running, running, save, save_template

KEY = "a-key-of-a-test-server"
FOLDER = Path(__file__).resolve().parents[3] / "ee_llm" / "serving" / "page"
SCRIPTS = sorted(FOLDER.glob("*.js"))
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model whose tokens and exits vary."""
    run = save(tmp_path_factory.mktemp("run"))
    with LLM(run, dtype="float64", chat_template=save_template(run)) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server
        server.wait_until_idle()


def test_the_model_describes_its_exits(llm: LLM, server: Running, tmp_path: Path) -> None:
    policy = {"measure": "max_probability", "thresholds": {"1": 0.8, "2": 0.8}}
    strategies = ["exact", "full", "self-speculative", "propagate", "sled", "dola"]
    described = {
        "num_layers": 4,
        "exits": [1, 2],
        "policy": policy,
        "strategies": strategies,
        "has_chat_template": True,
    }
    assert server.get("/v1/models").json()["data"][0]["ee"] == described
    assert server.get(f"/v1/models/{NAME}").json()["ee"] == described
    run = save(tmp_path, boundaries=())
    with LLM(run, dtype="float64") as dense, running(dense) as other:
        found = other.get("/v1/models").json()["data"][0]["ee"]
    assert (found["exits"], found["has_chat_template"]) == ([], False)
    assert "self-speculative" not in found["strategies"]


def test_every_file_is_served_and_may_load_nothing_from_elsewhere(server: Running) -> None:
    names = {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "")}
    assert {path.rpartition("/")[2] or "index.html" for path in PAGE_PATHS} == names
    for path in PAGE_PATHS:
        response = server.get(path)
        assert response.status_code == 200
        assert response.content == (FOLDER / (path.rpartition("/")[2] or "index.html")).read_bytes()
        policy = dict(
            one.split(maxsplit=1) for one in response.headers["content-security-policy"].split("; ")
        )
        assert policy["default-src"] == "'self'"
        assert not {"script-src", "style-src", "connect-src", "img-src"} & policy.keys()
        assert response.headers["x-content-type-options"] == "nosniff"
        # Scripts that are not declared as such would be refused.
        kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
        kind = kinds.get(Path(path).suffix, "text/html")
        assert response.headers["content-type"].partition(";")[0] == kind


@pytest.mark.parametrize("path", [path for path in FOLDER.iterdir() if path.is_file()])
def test_no_file_refers_to_other_hosts(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, never loaded
    assert not re.search(r"(https?:|['\"(=])//", text)
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", text)
    if path.suffix == ".js":
        words = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Storage|cookie"
        assert not re.search(words, text)


def test_references_of_the_page_exist() -> None:
    html = (FOLDER / "index.html").read_text()
    found = re.findall(r'(?:src|href)="([^"]+)"', html)
    for script in SCRIPTS:
        found += [f"page/{name}" for name in re.findall(r'from "\./(.+)"', script.read_text())]
    assert {f"/{path}" for path in found} == set(PAGE_PATHS) - {"/"}
    ids = set(re.findall(r'id="([\w-]+)"', html))
    assert set(re.findall(r'byId\("([\w-]+)"\)', (FOLDER / "page.js").read_text())) <= ids


def test_the_page_needs_no_key_but_the_model_does(llm: LLM) -> None:
    with running(llm, api_keys=(KEY,)) as server:
        for path in PAGE_PATHS:
            response = server.get(path)
            assert response.status_code == 200
            assert NAME not in response.text.split()
        assert server.get("/v1/models").status_code == 401
        assert server.get("/page/../v1/models").status_code == 401


def test_the_page_can_be_turned_off(llm: LLM) -> None:
    with running(llm, page=False) as server:
        assert [server.get(path).status_code for path in PAGE_PATHS] == [404] * len(PAGE_PATHS)
        assert server.get("/v1/models").status_code == 200


def colors(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, brighter = sorted(map(luminance, (one, other)))
    return (brighter + 0.05) / (darker + 0.05)


def test_colors_are_those_of_notebooks_and_can_be_read() -> None:
    light, dark = map(colors, (FOLDER / "style.css").read_text().split("@media (prefers")[:2])
    exits = [f"exit-{slot}" for slot in range(len(EXIT_COLORS))]
    assert [light[name] for name in exits] == list(EXIT_COLORS)
    assert light["final"] == FINAL_COLOR
    assert light.keys() == dark.keys()
    for palette in (light, dark):
        for name in (*exits, "final", "ink", "muted", "alarm", "accent"):
            for ground in ("paper", "page"):
                assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
        assert contrast(palette["accent"], palette["accent-ink"]) >= 4.5


def run_node(*options: str, script: str) -> str:
    assert NODE is not None
    command = [NODE, "--input-type=module", *options]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_node
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    run_node("--check", script=path.read_text())


@needs_node
def test_divergence_speed_and_events() -> None:
    calls = {
        'findDivergence(["a", "b"], ["a", "b", "c"], false)': None,
        'findDivergence(["a", "b"], ["a", "b"], true)': None,
        'findDivergence(["a", "b"], ["ab", "c"], true)': {"left": 2, "right": 1, "characters": 2},
        'findDivergence(["a", "", "bc"], ["ab", "d"], false)': {
            "left": 2,
            "right": 1,
            "characters": 2,
        },
        'findDivergence(["x"], ["y"], false)': {"left": 0, "right": 0, "characters": 0},
        "speed([[1, 0]])": None,
        "speed([[1, 1000], [1, 1500], [2, 2000]])": 3,
        "speed([[4, 1000], [4, 2000]])": 4,
        'events(["data: 1\\n", "\\nda", "ta: [DONE]\\n\\n"])': [[], ["1"], ["[DONE]"]],
        "tokensOf('{\"choices\": []}')": [],
    }
    script = f"""
        import {{ Speedometer, findDivergence }} from "{FOLDER.as_uri()}/comparison.js";
        import {{ makeEventReader, tokensOf }} from "{FOLDER.as_uri()}/stream.js";
        const speed = (adds) => {{
          const meter = new Speedometer();
          for (const one of adds) meter.add(...one);
          return meter.tokensPerSecond;
        }};
        const events = (parts) => parts.map(makeEventReader());
        console.log(JSON.stringify([{", ".join(calls)}]));
    """
    # node reads a file of the package as a module if it is told so.
    found = run_node("--experimental-default-type=module", script=script)
    assert dict(zip(calls, json.loads(found), strict=True)) == calls


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


READY = "!document.getElementById('generate').disabled"
FINISHED = "document.getElementById('verdict').textContent"


def set_fields(browser: Browser, **values: Any) -> None:
    """Give fields of the form values as a user does."""
    for id, value in values.items():
        name = "checked" if isinstance(value, bool) else "value"
        element = f"document.getElementById('{id.replace('_', '-')}')"
        browser.run(
            f"{element}.{name} = {json.dumps(value)};"
            f"{element}.dispatchEvent(new Event('input', {{bubbles: true}}));"
        )


def generate(browser: Browser) -> str:
    """Send the form and return the sentence about the result."""
    browser.run("document.getElementById('form').requestSubmit()")
    browser.wait(f"{READY} && {FINISHED}")
    return browser.run(FINISHED)


def texts(browser: Browser) -> list[str]:
    return browser.run(
        "[...document.querySelectorAll('.pane')].map((pane) =>"
        " [...pane.querySelectorAll('.token')].map((one) => one.textContent).join(''))"
    )


@needs_chromium
def test_the_page_shows_the_tokens_and_exits_of_the_model(
    llm: LLM, server: Running, browser: Browser
) -> None:
    browser.open(server.url)
    browser.wait(READY)
    browser.run("document.querySelector('[value=text]').click()")
    set_fields(browser, prompt="Once", threshold=0.25, max_tokens=12)
    said = generate(browser)
    params = SamplingParams(max_tokens=12)
    (early,) = llm.generate("Once", params, exits=0.25)
    (full,) = llm.generate("Once", params, strategy="full")
    assert len(set(early.exits)) > 1
    assert texts(browser) == [early.text, full.text]
    found = "[...document.querySelector('.pane').querySelectorAll('.token')]"
    assert browser.run(f"{found}.map((one) => Number(one.dataset.exit))") == list(early.exits)
    counts = "[...document.querySelector('.pane').querySelectorAll('.count')]"
    shown = browser.run(f"{counts}.map((one) => parseInt(one.textContent))")
    assert shown == [early.exits.count(depth) for depth in (1, 2, 4)]
    assert browser.run("document.querySelector('.mean').textContent") == f"{early.mean_depth:.2f}"
    marks = browser.run("document.querySelectorAll('.divergence').length")
    is_same = early.text == full.text
    assert (marks, "are the same" in said) == ((0, True) if is_same else (2, False))
    assert not browser.messages
    assert all(url.startswith(server.url) for url in browser.urls)

    # By keyboard: one token is in the order of the Tab key, arrow keys reach the others.
    browser.run("document.querySelector('.token[tabindex=\"0\"]').focus()")
    browser.press("ArrowRight")
    visible = [n for n, token in enumerate(early.tokens) if token.text]
    tip = browser.run("document.getElementById('tip').textContent")
    assert f"confidence {early.confidences[visible[1]]:.3f}" in tip
    assert f"token {visible[1] + 1}" in tip
    browser.press("Escape")
    assert browser.run("document.getElementById('tip').hidden")


@needs_chromium
def test_chats_and_texts_with_markup(llm: LLM, server: Running, browser: Browser) -> None:
    """A text never becomes markup."""
    browser.open(server.url)
    browser.wait(READY)
    prompt = "<img src=x onerror=alert(1)>"
    set_fields(browser, prompt=prompt, max_tokens=6, strategy="full")
    browser.run("document.getElementById('form').requestSubmit()")
    browser.wait(f"{READY} && document.querySelector('.pane')?.dataset.state === 'done'")
    (expected,) = llm.chat(
        [{"role": "user", "content": prompt}], SamplingParams(max_tokens=6), strategy="full"
    )
    assert texts(browser) == [expected.text]
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert browser.run("document.querySelector('.prompt').textContent").startswith(prompt)


@needs_chromium
def test_errors_of_the_server_are_shown(server: Running, browser: Browser) -> None:
    browser.open(server.url)
    browser.wait(READY)
    browser.run("document.querySelector('[value=text]').click()")
    set_fields(browser, prompt="x" * 80)
    browser.run("document.getElementById('form').requestSubmit()")
    browser.wait("document.querySelector('.error')?.textContent")
    shown = browser.run("document.querySelector('.error').textContent")
    assert "more than model.max_seq_length" in shown
    assert browser.run(READY)


@needs_chromium
def test_a_key_is_asked_for_and_used(llm: LLM, browser: Browser) -> None:
    with running(llm, api_keys=(KEY,)) as server:
        browser.open(server.url)
        browser.wait("!document.getElementById('key-field').hidden")
        assert browser.run(f"!({READY})")
        browser.run(
            f"document.getElementById('key').value = '{KEY}';"
            "document.getElementById('key').dispatchEvent(new Event('change'))"
        )
        browser.wait(READY)
        set_fields(browser, prompt="a", max_tokens=4)
        generate(browser)
        (expected,) = llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=4))
        assert texts(browser)[0] == expected.text
        assert (
            browser.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        )


@needs_chromium
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_fits_on_a_phone(server: Running, browser: Browser, is_dark: bool) -> None:
    browser.resize(360, 740, is_dark=is_dark)
    browser.open(server.url)
    browser.wait(READY)
    set_fields(browser, prompt="Once", max_tokens=40)
    generate(browser)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    ground = browser.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(14, 16, 19)") == is_dark
