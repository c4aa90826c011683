"""Check the files that a command or a function is asked to write."""

import os
from pathlib import Path

from ee_llm.errors import UserError


def check_writable(name: str, path: Path | None) -> None:
    """Raise UserError for a file that cannot be written, before any work is done.

    Args:
        name: The option or argument, such as --output.
        path: Its value. `--json -` is standard output.
    """
    if path is None or (name == "--json" and str(path) == "-"):
        return
    if path.is_dir():
        raise UserError(f"{name} {path} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise UserError(
            f"{name} {path}: the folder {path.parent} does not exist. Create it, or name another "
            "file."
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{name} {path} cannot be written: permission denied. Name another file.")
