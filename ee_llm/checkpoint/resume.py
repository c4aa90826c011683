"""Which checkpoint a run goes on from."""

import logging
from pathlib import Path

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.errors import CheckpointError

logger = logging.getLogger(__name__)


def is_path(resume: str) -> bool:
    """Return whether `checkpoint.resume` names a place, and not a habit."""
    return resume not in ("auto", "never")


def resume_path(config: Config) -> Path | None:
    """Return the checkpoint that `checkpoint.resume` means for this run, None to begin afresh.

    A run that began at a path and is started again by the same command goes on from the newest
    that it saved itself since, and says so. Raises CheckpointError if there is no such checkpoint,
    or if the newest of the output can not be read; but one of the output's own that is asked for
    is then taken, which is the way back.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return directory.find_latest(config.output)
    try:
        own = _saved_since(config.output, resume)
    except (ValueError, OSError) as error:
        if not Path(resume).resolve().is_relative_to(Path(config.output).resolve()):
            raise CheckpointError(
                f"{error}; to begin at {resume} once more, give another --output"
            ) from error
        logger.warning("%s; using %s as given", error, resume)
        own = None
    if own is None:
        return directory.resolve_checkpoint(resume)
    logger.info("this run started from %s and has saved since: resuming from %s", resume, own)
    return own


def initial_path(config: Config) -> Path | None:
    """Return the checkpoint whose parameters a new run begins with, None if it has none.

    Raises CheckpointError if there is none where one is asked for.
    """
    asked = config.tuning.checkpoint or config.checkpoint.initial
    return None if asked is None else directory.resolve_checkpoint(asked)


def _saved_since(output: str, resume: str) -> Path | None:
    """Return the newest checkpoint in `output` if it is of a run that was told to begin there."""
    newest = directory.find_latest(output)
    if newest is None:
        return None
    reader = TensorReader(newest)
    origin = reader.config().checkpoint.resume
    if not is_path(origin):  # it went on by itself in between, or never began at a path
        origin = reader.state().origin
    return newest if origin and Path(origin).resolve() == Path(resume).resolve() else None
