"""Errors that a user can act on, and errors that end a run.

The command line prints either kind as one line, without a traceback, and exits with status 2 for a
`UserError` and 1 for a `RunError`. Any other exception is a defect of ee_llm and keeps its
traceback.
"""

import contextlib
import re
from collections.abc import Collection, Iterator


class UserError(ValueError):
    """A mistake that the user can correct.

    The message says what is wrong, which value is wrong and where it came from, and what to do.
    """


class ConfigError(UserError):
    """The configuration has an unknown option, a value that is not allowed, or a contradiction."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the configuration."""


class ConversionError(UserError):
    """A model in another format cannot be converted."""


class DataError(UserError):
    """Training data, a tokenizer or a text file cannot be read or does not fit the model."""


class PlanError(UserError):
    """A pipeline plan is not possible or contradicts itself."""


class RequestError(UserError):
    """A generation request is not valid, or does not fit the model or the engine."""


class RunError(RuntimeError):
    """A run cannot continue for a reason outside its input, such as a lost rank."""


@contextlib.contextmanager
def naming_arguments(names: Collection[str]) -> Iterator[None]:
    """Let a UserError name arguments of a function instead of options of the command line.

    Parts that the command line and the Python API share write `--max-shard-gb 9`. For a function
    with the argument `max_shard_gb`, this becomes `max_shard_gb 9`.

    Args:
        names: The names of the function's arguments.
    """

    def argument(option: re.Match[str]) -> str:
        name = option[1].replace("-", "_")
        return name if name in names else option[0]

    try:
        yield
    except UserError as error:
        message = re.sub(r"(?<!\S)--([a-z][a-z-]*)", argument, str(error))
        raise type(error)(message) from error.__cause__
