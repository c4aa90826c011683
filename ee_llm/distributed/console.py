"""The console on standard error: lines from rank 0, and progress bars."""

import os

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def is_rank_zero() -> bool:
    """Return whether this process is rank 0 of the run, or runs without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def print_line(text: str, style: str | None = None) -> None:
    """Print a line of plain text to standard error, on rank 0 only.

    Long lines wrap on a terminal but not in a file, where tools parse them.

    Args:
        text: The line. Brackets are not markup.
        style: A rich style for the whole line, such as "yellow".
    """
    if is_rank_zero():
        console.print(text, style=style, soft_wrap=True, markup=False, emoji=False)


def progress_bar(
    description: str,
    total: int,
    amount: ProgressColumn,
    *,
    completed: int = 0,
    is_quiet: bool = False,
) -> Progress:
    """Return a progress bar with one task, to be started or used as a context manager.

    The bar is shown on terminals only and removed when it stops.

    Args:
        description: Description of the work.
        total: Amount of work, in any unit.
        amount: The column that shows how much of `total` is done.
        completed: Amount of work that is done at the start.
        is_quiet: Never show the bar.
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
    progress.add_task(description, total=total, completed=completed)
    return progress
