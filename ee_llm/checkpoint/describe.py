"""What a checkpoint says about its model, so that a configuration need not say it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_llm.checkpoint.read import TensorReader


def described_options(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, by section, of a checkpoint's model and of its exits, if it has any.

    `given` are options that take precedence: exits may be added in exits.boundaries, and each keeps
    its temperature. Raises CheckpointError if the checkpoint can not be read.
    """
    saved = TensorReader(path).config()
    options: dict[str, Any] = {"model": saved.model.model_dump()}
    if not saved.exits.boundaries:
        return options
    section = given.get("exits")
    asked = section.get("boundaries") if isinstance(section, Mapping) else None
    boundaries = saved.exits.boundaries
    # Anything else is refused by the configuration that these become a part of.
    if isinstance(asked, list | tuple) and all(isinstance(number, int) for number in asked):
        boundaries = tuple(asked)
    known = dict(zip(saved.exits.boundaries, saved.exits.temperatures, strict=True))
    options["exits"] = {
        "boundaries": boundaries,
        "head": saved.exits.head,
        "output": saved.exits.output,
        "temperatures": tuple(known.get(boundary, 1.0) for boundary in boundaries),
    }
    return options
