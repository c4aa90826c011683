"""Tiny tuning runs: a dense model of six layers, and the options to tune exits on it."""

from pathlib import Path
from typing import Any

from ee_llm.config import Config
from tests.distributed.runs import make_config, train_ranks

NO_EXITS = {"exits.boundaries": (), "exits.weights": (), "exits.output": "shared"}
SIX_LAYERS = {"model.num_layers": 6}
TWO_EXITS = {**SIX_LAYERS, "exits.boundaries": (2, 5), "exits.weights": (0.3, 0.7)}
TUNED = {"tuning.checkpoint": "given elsewhere"}


def dense_config(output: Path, corpus: str, **overrides: Any) -> Config:
    """Return a run that trains the model without exits for a few steps."""
    options = {**NO_EXITS, **SIX_LAYERS, "training.steps": 3, "checkpoint.interval": 0}
    return make_config(output, corpus, **options | overrides)


def tuning_config(output: Path, corpus: str, checkpoint: Path | str, **overrides: Any) -> Config:
    """Return a run that tunes exits at 2 and 5, so that two of four stages train nothing."""
    options = {
        **SIX_LAYERS,
        "tuning.checkpoint": str(checkpoint),
        "exits.boundaries": (2, 5),
        "exits.weights": (0.3, 0.7),
        "exits.output": "own",
    }
    return make_config(output, corpus, **options | overrides)


def tune(world_size: int, config: Config) -> str:
    """Return the checkpoint, or the error that every rank raised."""
    [end] = {end.partition(": ")[2] or end for end in train_ranks(world_size, config)}
    return end
