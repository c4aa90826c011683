"""Messages for people: one console, written by rank 0 alone, and a bar for long work."""

import os

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def is_rank_zero() -> bool:
    """Return whether this process is the first of the run."""
    return os.environ.get("RANK", "0") == "0"


def log(message: str) -> None:
    """Print a line to standard error from rank 0; rich markup is understood.

    Only terminals wrap it: in a file it stays one line, to be searched and parsed.
    """
    if is_rank_zero():
        console.print(message, soft_wrap=True)


def progress_bar(
    what: str, total: int, amount: ProgressColumn, *, completed: int = 0, is_quiet: bool = False
) -> Progress:
    """Return a bar of one task, to be entered or started: where somebody looks, until it is done.

    amount: the column that says how much of `total` is done.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=is_quiet or not console.is_terminal,
    )
    progress.add_task(what, total=total, completed=completed)
    return progress
