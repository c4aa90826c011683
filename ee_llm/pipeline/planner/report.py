"""Plan a run and show its schedule as text, as JSON, as a picture and as a trace."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_llm.config import Config
from ee_llm.errors import ConfigError
from ee_llm.pipeline.planner import describe
from ee_llm.pipeline.planner.costs import NOMINAL, Pieces
from ee_llm.pipeline.planner.describe import Clock
from ee_llm.pipeline.planner.picture import save_picture
from ee_llm.pipeline.planner.predict import Prediction, predict
from ee_llm.pipeline.planner.trace import chrome_trace
from ee_llm.pipeline.selection import FILLS, select_fills

DEFAULT_WIDTH = 160
"""Longest line of the grid, in characters, where there is no terminal."""


@dataclass(frozen=True, repr=False)
class PlanReport:
    """The predicted schedule of a run; `repr` returns the grid, the times and the memory."""

    prediction: Prediction
    logits_size: float = 1.0
    """Memory of one exit's logits for one microbatch, in activations of one layer for one."""

    @property
    def clock(self) -> Clock:
        """Unit of the times in the report: seconds, unless the costs are nominal."""
        return describe.clock_of(self.prediction, in_seconds=self.prediction.pieces is not NOMINAL)

    def text(self, width: int = DEFAULT_WIDTH) -> str:
        """Return the layout, the grid (lines of at most `width` characters), summary and notes."""
        parts = [
            describe.layout_lines(self.prediction),
            describe.readable_grid(self.prediction, width),
            describe.summary(self.prediction, self.clock, self.logits_size),
        ]
        if notes := describe.notes(self.prediction.config):
            parts.append("\n".join(f"note: {note}" for note in notes))
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        return self.text()

    def as_json(self, *, timeline: bool = True) -> dict[str, Any]:
        """Return the figures for JSON, with the start and end of every action if `timeline`."""
        return describe.as_json(self.prediction, self.clock, self.logits_size, timeline=timeline)

    def save_picture(self, path: Path) -> None:
        """Draw the schedule to a .png or .svg file."""
        clock = self.clock
        title = describe.title(self.prediction, clock)
        save_picture(self.prediction, path, title, clock.unit, clock.scale)

    def save_trace(self, path: Path) -> None:
        """Write the schedule as a trace file for chrome://tracing or ui.perfetto.dev."""
        clock = self.clock
        trace = chrome_trace(
            self.prediction.simulation.timeline.ranks,
            filling=self.prediction.filling,
            exit_part=self.prediction.exit_part,
            # A nominal unit of time is drawn as a millisecond.
            seconds=1.0 if clock.unit in ("s", "ms") else 1e-3 / clock.scale,
            notes={"title": describe.title(self.prediction, clock)},
        )
        path.write_text(json.dumps(trace) + "\n", encoding="utf-8")


def plan(
    config: Config,
    num_processes: int | None = None,
    *,
    num_microbatches: int | None = None,
    pieces: Pieces = NOMINAL,
    logits_size: float = 1.0,
) -> PlanReport:
    """Return the predicted schedule of a training run.

    Args:
        config: The configuration of the run.
        num_processes: The number of processes of the run, which share the global batch; those of
            one data-parallel rank if None.
        num_microbatches: The number of microbatches in one step of one data-parallel rank; that of
            the configuration and `num_processes` if None.
        pieces: The time that each piece of the model takes for one microbatch.
        logits_size: See `PlanReport`.

    Raises:
        ConfigError: The configuration is of tuning, or has no such schedule.
    """
    refuse_tuning(config)
    if num_microbatches is None:
        one_rank = config.parallel.pipeline * config.parallel.tensor
        num_microbatches = config.num_microbatches(num_processes or one_rank)
    values = config.model_dump()
    values["parallel"] |= dict(
        zip((name.rpartition(".")[2] for name in FILLS), select_fills(config), strict=True)
    )
    return PlanReport(predict(Config(**values), num_microbatches, pieces), logits_size)


def refuse_tuning(config: Config) -> None:
    """Raise ConfigError for the configuration of tuning, which has one schedule only."""
    if config.is_tuning:
        raise ConfigError(
            f"tuning.checkpoint = {config.tuning.checkpoint}: tuning has only one schedule, "
            "without backward passes between stages. Remove the option to plan the training of "
            "the whole model."
        )
