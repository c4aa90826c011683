"""Draw docs/images/generation.svg: a generation whose tokens are coloured by exit depth.

    ./scripts/quickstart.sh                  # trains the model, once
    python tools/docs/generation.py          # generates with it and draws the picture
    python tools/docs/generation.py RECORD   # draws what `ee-llm generate --json` printed

The colours are from Okabe and Ito's palette, which colour-blind readers can distinguish. They also
differ in lightness, and the bar above each token is proportional to its depth.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "generation.svg"
COMMAND = (
    "generate", "--checkpoint", "runs/quickstart", "--prompt",
    "def read_lines(self, filename, encoding=None):\n", "--thresholds", "0.5",
    "--max-tokens", "96", "--temperature", "0.7", "--json",
)  # fmt: skip

EXIT_COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442")
FINAL_COLOR, PROMPT_COLOR = "#ececec", "none"
COLUMNS = 100
LINE_BREAK = "\u21b5"  # shows which exit decided a line break
CHAR_WIDTH, LINE_HEIGHT, MARGIN, FONT_SIZE = 8.4, 26, 14, 14
BAR_HEIGHT = 5  # of a token that passes all layers

Span = tuple[str, int]  # text without line breaks, depth in layers (0: the prompt)


def generate() -> dict[str, Any]:
    """Run `ee-llm generate` on the quick start's model and return its record."""
    done = subprocess.run(
        [sys.executable, "-m", "ee_llm", *COMMAND], cwd=ROOT, capture_output=True, check=True
    )
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def lay_out(record: dict[str, Any]) -> list[list[Span]]:
    """Return the lines of prompt and tokens, each wrapped to at most `COLUMNS` characters."""
    pieces = [(record["prompt"], 0), *zip(record["pieces"], record["exits"], strict=True)]
    lines: list[list[Span]] = [[]]
    column = 0
    for text, depth in pieces:
        for part in text.expandtabs(4).splitlines(keepends=True):
            shown = part.replace("\n", LINE_BREAK if depth else "")
            if column + len(shown) > COLUMNS:
                lines.append([])
                column = 0
            if shown:
                lines[-1].append((shown, depth))
                column += len(shown)
            if part.endswith("\n"):
                lines.append([])
                column = 0
    while lines and not lines[-1]:
        lines.pop()
    return lines


def legend(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the colour and label of each exit, shallow to deep."""
    exits, num_layers = record["exits"], record["num_layers"]
    rows = []
    for boundary, color in colors(record).items():
        share = exits.count(boundary) / len(exits)
        name = f"all {num_layers} layers" if boundary == num_layers else f"exit {boundary}"
        rows.append((color, f"{name}: {share:.0%} of tokens"))
    return rows


def colors(record: dict[str, Any]) -> dict[int, str]:
    """Return the colour of each exit by the layer it follows."""
    boundaries = sorted(map(int, record["policy"]["thresholds"]))
    found = dict(zip(boundaries, EXIT_COLORS, strict=False))
    return {**found, record["num_layers"]: FINAL_COLOR}


def draw(record: dict[str, Any]) -> str:
    """Return the picture of a record as SVG."""
    lines = lay_out(record)
    color_of = {**colors(record), 0: PROMPT_COLOR}
    columns = max(sum(len(text) for text, _ in line) for line in lines)
    legend_columns = sum(len(label) + 6 for _, label in legend(record))
    width = MARGIN * 2 + CHAR_WIDTH * max(columns, legend_columns)
    height = MARGIN * 2 + LINE_HEIGHT * len(lines) + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}"'
        f' width="{width:.0f}" height="{height}" font-family="DejaVu Sans Mono, Menlo, Consolas,'
        f' monospace" font-size="{FONT_SIZE}">',
        "<title>A generation of the quick start's model, each token coloured by its exit</title>",
        f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
    ]
    for row, line in enumerate(lines):
        x, top = float(MARGIN), MARGIN + row * LINE_HEIGHT
        for text, depth in line:
            parts += _token(text, depth / record["num_layers"], color_of[depth], x, top)
            x += CHAR_WIDTH * len(text)
    x, top = float(MARGIN), height - 44
    for color, label in legend(record):
        parts.append(f'<rect x="{x:.1f}" y="{top}" width="14" height="14" fill="{color}"/>')
        parts.append(_text(label, x + 20, top + 12, "#1f2328"))
        x += CHAR_WIDTH * (len(label) + 6)
    summary = f"mean depth {record['mean_depth']:.2f} of {record['num_layers']} layers"
    parts.append(_text(f"{summary}; no background: the prompt", MARGIN, height - 12, "#57606a"))
    return "\n".join([*parts, "</svg>", ""])


def _token(text: str, depth: float, color: str, x: float, top: float) -> list[str]:
    """Return background, depth bar and text of a token; `depth` is a share of all layers."""
    width = CHAR_WIDTH * len(text)
    parts = []
    if color != PROMPT_COLOR:
        bar = BAR_HEIGHT * depth
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{top + 6}" width="{width - 1:.1f}"'
            f' height="{LINE_HEIGHT - 7}" fill="{color}"/>'
        )
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{top + 6 - bar:.1f}" width="{width - 1:.1f}"'
            f' height="{bar:.1f}" fill="#57606a"/>'
        )
    if text.strip():
        parts.append(_text(text, x, top + 20, "#1f2328"))
    return parts


def _text(text: str, x: float, y: float, color: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" xml:space="preserve"'
        f' textLength="{CHAR_WIDTH * len(text):.1f}">{escape(text)}</text>'
    )


def main() -> None:
    """Draw a given record, or a new generation of the quick start's model."""
    record = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else generate()
    PICTURE.write_text(draw(record), encoding="utf-8")


if __name__ == "__main__":
    main()
