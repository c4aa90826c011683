"""The page at `/`: watch where the tokens of a generation exit, in a browser."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Response

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
} | {
    f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
    for name in ("page", "pane", "tip", "comparison", "stream")
}

PAGE_PATHS = tuple(_FILES)
"""Paths of the page, which need no API key: they tell nothing about the model."""

HEADERS = {
    # The page shows texts that a model wrote. None of them can become markup or a script.
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none';"
        " frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # A newer ee_llm may have another page.
}
"""Headers of the page and of its files."""


def add_page(app: FastAPI) -> None:
    """Add the routes of the page to an application."""
    for path, (name, media_type) in _FILES.items():
        content = (_FOLDER / name).read_bytes()
        app.get(path, include_in_schema=False)(_make_endpoint(content, media_type))


def _make_endpoint(content: bytes, media_type: str) -> Callable[[], Response]:
    def get_file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return get_file
