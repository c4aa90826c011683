"""Check the files that a command is asked to write."""

from pathlib import Path

from ee_llm.errors import UserError


def check_writable(name: str, path: Path | None) -> None:
    """Raise UserError for a file in a folder that does not exist, before any work is done.

    Args:
        name: The option.
        path: Its value.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{name} {path} is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise UserError(
            f"{name} {path}: the folder {path.parent} does not exist. Create it, or name another "
            "file."
        )
