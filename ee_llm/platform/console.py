"""Messages for people: one console, written by rank 0 alone."""

import os

from rich.console import Console

console = Console(stderr=True, highlight=False)


def is_rank_zero() -> bool:
    """Return whether this process is the first of the run."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """Print a line to standard error from rank 0; rich markup is understood."""
    if is_rank_zero():
        console.print(message)
