"""The checkpoint from which a run resumes or starts."""

import logging
from pathlib import Path

from ee_llm.checkpoint import directory
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config import Config
from ee_llm.errors import CheckpointError

logger = logging.getLogger(__name__)


def is_path(resume: str) -> bool:
    """Return whether `checkpoint.resume` is a path and not `auto` or `never`."""
    return resume not in ("auto", "never")


def resume_path(config: Config) -> Path | None:
    """Return the checkpoint from which this run resumes, or None to start a new run.

    A run that was started from a path and is restarted with the same command resumes from the
    newest checkpoint that it saved itself since, and logs this. Raises CheckpointError if
    `checkpoint.resume` names no checkpoint, or if the newest checkpoint in `output` cannot be read;
    in the latter case a checkpoint within `output` that `checkpoint.resume` names is used instead,
    so that a run with a damaged checkpoint can be continued from an older one.
    """
    resume = config.checkpoint.resume
    if resume == "never":
        return None
    if resume == "auto":
        return directory.find_latest(config.output)
    try:
        own = _saved_since(config.output, resume)
    except (ValueError, OSError) as error:
        reason = str(error).removesuffix(".")
        if not Path(resume).resolve().is_relative_to(Path(config.output).resolve()):
            raise CheckpointError(
                f"{reason}. To start from {resume} again, choose another --output."
            ) from error
        logger.warning("%s. Resuming from %s as requested.", reason, resume)
        own = None
    if own is None:
        return directory.resolve_checkpoint(resume)
    logger.info("this run started from %s and has saved since: resuming from %s", resume, own)
    return own


def initial_path(config: Config) -> Path | None:
    """Return the checkpoint that initializes the parameters of a new run, or None.

    Raises CheckpointError if the configuration names a checkpoint that does not exist.
    """
    path = config.tuning.checkpoint or config.checkpoint.initial
    return None if path is None else directory.resolve_checkpoint(path)


def _saved_since(output: str, resume: str) -> Path | None:
    """Return the newest checkpoint in `output` if its run was started from `resume`."""
    newest = directory.find_latest(output)
    if newest is None:
        return None
    reader = TensorReader(newest)
    origin = reader.config().checkpoint.resume
    if not is_path(origin):  # it resumed automatically since, or never started from a path
        origin = reader.state().origin
    return newest if origin and Path(origin).resolve() == Path(resume).resolve() else None
