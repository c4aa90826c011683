"""Write and print the result of a command that runs a model over given text."""

import json
from pathlib import Path
from typing import Any

from ee_llm import distributed
from ee_llm.launch.rank import is_launched


def show(result: Any, json_path: Path | None, written: tuple[Path | None, ...] = ()) -> None:
    """Write a result as JSON and print it, on the first rank.

    Args:
        result: The result, with `to_dict`; its repr is what a person reads.
        json_path: The file of --json; - prints the JSON and nothing else.
        written: Other files that the command has written, to be named.
    """
    write_json(result, json_path)
    print_result(result, json_path, written)


def write_json(result: Any, json_path: Path | None) -> None:
    """Write a result to the file of --json, on the first rank; nothing for - and None."""
    if distributed.is_rank_zero() and json_path is not None and str(json_path) != "-":
        json_path.write_text(f"{_as_json(result)}\n", encoding="utf-8")


def print_result(
    result: Any, json_path: Path | None, written: tuple[Path | None, ...] = ()
) -> None:
    """Print a result on the first rank; see `show`."""
    # The process that has started this rank prints the result.
    if not distributed.is_rank_zero() or is_launched():
        return
    if str(json_path) == "-":
        print(_as_json(result))
        return
    print(result)
    if names := [str(path) for path in (json_path, *written) if path is not None]:
        print(f"\nwrote {', '.join(names)}")


def _as_json(result: Any) -> str:
    return json.dumps(result.to_dict(), indent=2)
