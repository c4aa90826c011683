"""The state of a run that a checkpoint stores besides its tensors."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeInt, Strict

from ee_llm.checkpoint.format.json_content import StrictModel, validate

STATE = "state.json"

DataFile = tuple[str, int, int]
"""The name of a prefix of training data, and the sizes of its .bin and .idx files in bytes."""


@dataclass
class TrainState:
    """The progress of a run. The learning rate and the order of the data follow from it."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Sequences taken from the training data: the position at which to resume."""
    skipped_steps: int = 0
    """Steps skipped because the loss or a gradient was not finite."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further values, of JSON types."""
    data: list[DataFile] = field(default_factory=list)
    """The files of training data, as returned by `data_files`."""
    origin: str = ""
    """The path in `checkpoint.resume` from which the run started, or ""."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any, source: Path) -> "TrainState":
        """Return the state in a parsed JSON file; raises CheckpointError naming a wrong field."""
        return cls(**validate(_StateFile, content, source).model_dump())


class _StateFile(StrictModel):
    """The file's schema. Older checkpoints have neither `data` nor `origin`."""

    model_config = ConfigDict(extra="forbid")

    step: NonNegativeInt
    consumed_samples: NonNegativeInt
    skipped_steps: NonNegativeInt
    extra: dict[str, Any]
    # JSON has lists where Python has tuples.
    data: list[Annotated[DataFile, Strict(False)]] = Field(default_factory=list)
    origin: str = ""


def data_files(prefixes: Sequence[str]) -> list[DataFile]:
    """Return the name and the file sizes of each prefix, or nothing if a file is missing."""
    try:
        return [
            (Path(p).name, os.stat(f"{p}.bin").st_size, os.stat(f"{p}.idx").st_size)
            for p in prefixes
        ]
    except OSError:  # the run has the files open, so it can continue and save
        return []
