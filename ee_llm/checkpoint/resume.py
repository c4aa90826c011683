"""Which checkpoint a run goes on from."""

import contextlib
from pathlib import Path

from rich.markup import escape

from ee_llm import platform
from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import CONFIG
from ee_llm.config import Config, load_config


def resume_path(config: Config) -> Path | None:
    """Return the checkpoint that `checkpoint.resume` means for this run, None to begin afresh.

    A run that began at a path and is started again by the same command goes on from the newest
    that it saved itself since, and says so. Raises CheckpointError if there is no such checkpoint.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return directory.find_latest(config.output)
    own = _saved_since(config.output, resume)
    if own is None:
        return directory.resolve_checkpoint(resume)
    platform.log(escape(f"this run began at {resume} and saved since: taking {own} instead"))
    return own


def _saved_since(output: str, resume: str) -> Path | None:
    """Return the newest checkpoint in `output` if it is of a run that was told to begin there."""
    with contextlib.suppress(ValueError, OSError):  # what is damaged does not stand in the way
        newest = directory.find_latest(output)
        if newest is not None and load_config(newest / CONFIG).checkpoint.resume == resume:
            return newest
    return None
