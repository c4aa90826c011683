"""Draw docs/images/watermarks.png: four sequences in the scheduler, and its next pass.

    python tools/docs/watermarks.py [FILE]

No model runs; random numbers decide which exits are confident.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.request import ExitResult, Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import SchedulerOutput
from ee_llm.inference.scheduling.scheduler import Scheduler
from ee_llm.inference.sequence import Sequence

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "watermarks.png"

BOUNDARIES = (2, 4, 8)
MAX_PENDING = 9
PROMPTS = {"A": 4, "B": 3, "C": 5, "D": 12}
# Colours that colour-blind readers can distinguish. The next pass is also hatched.
PROCESSED, PASS, PENDING, FRONTIER = "#a6cee3", "#e69f00", "#0072b2", "#000000"
GREY = "#8a8a8a"


@dataclass(frozen=True)
class Strip:
    """The state of a sequence: its tokens, its watermarks and its rows in the next pass."""

    name: str
    num_prompt: int
    num_tokens: int
    watermarks: tuple[int, ...]
    running: tuple[tuple[int, int], ...]  # per segment: first row, row after the last


def play(seed: int, num_passes: int) -> list[Strip]:
    """Return the sequences after `num_passes` passes, with their rows in the next pass."""
    rng = random.Random(seed)
    scheduler_config = SchedulerConfig(
        4, num_blocks=65, block_size=4, max_pending=MAX_PENDING, max_num_batched_tokens=10
    )
    scheduler = Scheduler(
        len(BOUNDARIES), scheduler_config, BlockManager(65, 4), deferral_targets=[1, 2, 2]
    )
    policy = make_exit_policy(BOUNDARIES[:-1], (0.5, 0.5))
    sequences = {}
    for name, length in PROMPTS.items():
        request = Request(name, (1,) * length, policy, SamplingParams(max_tokens=40))
        sequences[name] = Sequence(request, BOUNDARIES, max_length=64, vocab_size=200)
    for name in ("A", "B", "C"):
        scheduler.add(sequences[name])
    for number in range(num_passes):
        if number == num_passes - 2:
            scheduler.add(sequences["D"])
        scheduler_output = scheduler.schedule()
        assert scheduler_output is not None, "there is work"
        scheduler.apply(
            scheduler_output,
            [
                _exit_result(head.slot, scheduler_output, rng)
                for head in scheduler_output.logit_rows
            ],
        )
    before = {name: _state(sequence) for name, sequence in sequences.items()}
    scheduler_output = scheduler.schedule()
    assert scheduler_output is not None, "there is work"
    return [
        Strip(name, PROMPTS[name], *before[name], _rows(scheduler_output, sequence))
        for name, sequence in sequences.items()
    ]


def _exit_result(slot: int, scheduler_output: SchedulerOutput, rng: random.Random) -> ExitResult:
    (token_range,) = (one for one in scheduler_output.logit_rows if one.slot == slot)
    is_final = scheduler_output.last_segment == len(BOUNDARIES) - 1
    return ExitResult(slot, token_range.start, is_final or rng.random() < 0.7, 1, 0.6, -0.5)


def _state(sequence: Sequence) -> tuple[int, tuple[int, ...]]:
    return len(sequence.tokens), tuple(sequence.watermarks)


def _rows(scheduler_output: SchedulerOutput, sequence: Sequence) -> tuple[tuple[int, int], ...]:
    rows = [(0, 0)] * len(BOUNDARIES)
    for step in scheduler_output.steps:
        for token_range in step.ranges:
            if token_range.slot == sequence.slot:
                rows[step.segment] = (token_range.start, token_range.stop)
    return tuple(rows)


def draw(strips: list[Strip], path: Path) -> None:
    """Write the picture of the sequences to `path`."""
    pyplot.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "hatch.linewidth": 0.7})
    figure, panels = pyplot.subplots(len(strips), 1, figsize=(8.4, 6.6), sharex=True)
    width = max(strip.num_tokens for strip in strips)
    for strip, panel in zip(strips, panels, strict=True):
        _draw_strip(panel, strip, width)
    panels[-1].set_xticks([x + 0.5 for x in range(width)], [str(x) for x in range(width)])
    panels[-1].set_xlabel("position")
    figure.legend(
        handles=[
            Patch(facecolor=PROCESSED, label="processed, keys and values exact"),
            Patch(facecolor=PASS, hatch="////", edgecolor="white", label="runs in the next pass"),
            Patch(facecolor="white", edgecolor="#d0d0d0", label="not processed yet"),
            Line2D([], [], color=PENDING, marker="o", lw=0, label="pending, state in a ring"),
            Line2D([], [], color=FRONTIER, lw=2.4, label="watermarks"),
            Patch(facecolor="none", edgecolor=FRONTIER, linestyle="--", label="frontier"),
        ],
        loc="lower center",
        ncols=3,
        frameon=False,
        columnspacing=2.0,
    )
    figure.subplots_adjust(left=0.1, right=0.76, top=0.975, bottom=0.165, hspace=0.36)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _draw_strip(panel: Axes, strip: Strip, width: int) -> None:
    num_segments = len(BOUNDARIES)
    for segment, (mark, running) in enumerate(zip(strip.watermarks, strip.running, strict=True)):
        for position in range(strip.num_tokens):
            is_running = running[0] <= position < running[1]
            color = PROCESSED if position < mark else PASS if is_running else "white"
            edge = "#d0d0d0" if color == "white" else "white"
            hatch = "////" if color == PASS else None
            place = (position, segment)
            panel.add_patch(
                Rectangle(place, 1, 1, facecolor=color, edgecolor=edge, hatch=hatch, linewidth=1)
            )
    for segment in range(num_segments - 1):  # the ring after each segment except the last
        first, last = strip.watermarks[segment + 1], strip.watermarks[segment]
        positions = [position + 0.5 for position in range(first, last)]
        panel.plot(positions, [segment + 1] * len(positions), "o", color=PENDING, ms=7, zorder=4)
    for segment, mark in enumerate(strip.watermarks):
        panel.plot([mark, mark], [segment, segment + 1], color=FRONTIER, lw=2.4, zorder=3)
        above = strip.watermarks[segment + 1] if segment + 1 < num_segments else mark
        panel.plot([above, mark], [segment + 1] * 2, color=FRONTIER, lw=2.4, zorder=3)
    frontier = (strip.num_tokens - 1 + 0.06, 0.04)
    panel.add_patch(
        Rectangle(
            frontier, 0.88, num_segments - 0.08, fill=False, edgecolor=FRONTIER, ls="--", lw=1.2,
            zorder=5,
        )
    )  # fmt: skip
    panel.plot([strip.num_prompt] * 2, [-0.35, 0], color=GREY, lw=1, clip_on=False)
    panel.text(strip.num_prompt - 0.12, -0.2, "prompt", ha="right", va="center", color=GREY, size=7)
    if strip.num_tokens > strip.num_prompt:
        panel.text(strip.num_prompt + 0.12, -0.2, "new", va="center", color=GREY, size=7)
    marks = ", ".join(map(str, strip.watermarks))
    panel.text(width + 0.5, 2.6, f"sequence {strip.name}", size=11, weight="bold", va="center")
    panel.text(width + 0.5, 1.95, f"n = {strip.num_tokens},  w = ({marks})", va="center")
    panel.text(width + 0.5, 1.3, _remark(strip), va="center", color="#444444", size=8)
    panel.set_xlim(0, width)
    panel.set_ylim(-0.4, num_segments + 0.02)
    layers = zip((1, *(b + 1 for b in BOUNDARIES)), BOUNDARIES, strict=False)
    names = [f"layers {a}–{b}" for a, b in layers]
    panel.set_yticks([segment + 0.5 for segment in range(num_segments)], names)
    panel.tick_params(length=0)
    for boundary in range(1, num_segments + 1):
        name = "final exit" if boundary == num_segments else f"exit {BOUNDARIES[boundary - 1]}"
        panel.text(-0.22, boundary, name, ha="right", va="center", color=GREY, size=7)
    for side in panel.spines.values():
        side.set_visible(False)


def _remark(strip: Strip) -> str:
    num_pending = strip.watermarks[0] - strip.watermarks[-1]
    runs = next((s for s, (first, last) in enumerate(strip.running) if last > first), None)
    if runs is None:
        return f"{num_pending} rows pending; its frontier runs\nafter the next pass"
    boundary = BOUNDARIES[runs - 1]
    if num_pending == MAX_PENDING:
        return f"{num_pending} rows pending, the ring is full:\nthose at exit {boundary} go deeper"
    return f"declined exit {boundary}: goes deeper\nin the same pass"


if __name__ == "__main__":
    draw(play(seed=2994, num_passes=30), Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
