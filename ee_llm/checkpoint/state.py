"""How far a run came: what a checkpoint states besides its tensors."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ee_llm.errors import CheckpointError

STATE = "state.json"
_LATER = {"data", "origin"}  # fields that older checkpoints lack
_COUNTS = ("step", "consumed_samples", "skipped_steps")


@dataclass
class TrainState:
    """How far a run came. The learning rate and the data's order follow from it."""

    step: int = 0
    """Steps taken, skipped ones included."""
    consumed_samples: int = 0
    """Sequences taken from the training data: the position to go on from."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything else that JSON can hold."""
    data: list[list[Any]] = field(default_factory=list)
    """Name, bytes of .bin and bytes of .idx of each prefix, as `data_files` has them."""
    origin: str = ""
    """The path in `checkpoint.resume` that the run began at, if it began at one."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any, source: Path) -> "TrainState":
        """Return the state in a checkpoint's JSON; raises CheckpointError if it is none."""
        expected = set(cls.__dataclass_fields__)
        if not isinstance(content, dict) or set(content) | _LATER != expected:
            raise CheckpointError(
                f"{source}: expected the fields {sorted(expected)} of a run's state"
            )
        for name in _COUNTS:
            if type(content[name]) is not int or content[name] < 0:
                raise CheckpointError(f"{source}: {name} is {content[name]!r}, expected a count")
        state = cls(**content)
        if not isinstance(state.origin, str):
            raise CheckpointError(f"{source}: origin is {state.origin!r}, expected a path")
        if not isinstance(state.data, list) or not all(map(_is_data_file, state.data)):
            raise CheckpointError(
                f"{source}: data is {state.data!r}, expected a name and two sizes of each prefix"
            )
        return state


def data_files(prefixes: Sequence[str]) -> list[list[Any]]:
    """Return name, bytes of .bin and bytes of .idx of each prefix; nothing if a file is gone."""
    try:
        return [
            [Path(prefix).name, *(os.stat(f"{prefix}{end}").st_size for end in (".bin", ".idx"))]
            for prefix in prefixes
        ]
    except OSError:  # the run has them open: it can go on, and save
        return []


def _is_data_file(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [str, int, int]
