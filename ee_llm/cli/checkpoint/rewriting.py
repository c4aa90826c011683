"""Write a changed checkpoint and print the result, as several commands do."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ee_llm import distributed
from ee_llm.checkpoint.surgery.rewrite import Rewrite, write_rewrite


def write(
    rewrite: Rewrite, output: Path, *, as_json: bool, facts: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint into the run directory `output` and print its path and size.

    facts: further entries of the JSON object.
    """
    with progress("writing", rewrite.num_bytes, is_quiet=as_json) as advance:
        result = write_rewrite(rewrite, output, lambda _, size: advance(size))
    if as_json:
        record = {
            "output": str(result.output),
            "notes": list(result.notes),
            "tensors": result.num_tensors,
            "bytes": result.num_bytes,
            **(facts or {}),
        }
        print(json.dumps(record))
        return
    console = Console(soft_wrap=True, highlight=False)
    for note in result.notes:
        console.print(f"note: {escape(note)}")
    console.print(escape(str(result)))


@contextmanager
def progress(title: str, total: int, *, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar, and yield a function that advances it."""
    share = TextColumn("{task.percentage:.0f} %")
    with distributed.progress_bar(title, total, share, is_quiet=is_quiet) as bar:
        yield lambda amount: bar.advance(bar.task_ids[0], amount)
