"""Begins a new run with a checkpoint's parameters; it may lack exits, and the run may build a part.

A tuning run (`config.is_tuning`) builds the model up to the last exit that it tunes, and no other
exit. What it does not build has to be in the checkpoint all the same, in the right shape: a saved
checkpoint is of the whole model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.sharded import state_dict
from ee_llm.checkpoint.sharded.agreement import together
from ee_llm.checkpoint.sharded.load import (
    Pairs,
    check_unread,
    compare_tensors,
    exit_pairs,
    model_pairs,
    open_reader,
    refuse_different,
)
from ee_llm.checkpoint.sharded.shard_reader import read_under
from ee_llm.config import Config
from ee_llm.errors import CheckpointError


class WarmStart(NamedTuple):
    """The checkpoint that a run began with, and its exits' shards on this rank that it lacks.

    Those have the values that they were built with.
    """

    reader: TensorReader
    lacking: state_dict.Flat


def warm_start(
    path: str | Path, stages: Sequence[state_dict.ShardedModule], config: Config
) -> WarmStart:
    """Give the stages their parameters from a checkpoint, or the newest of a run directory.

    Collective. Raises CheckpointError, before anything is changed, if a file is missing, truncated
    or foreign, if model, heads or tokenizer are not those of `config`, if the checkpoint has an
    exit that `config` has not, or if its tensors are not those of the model, exits that it lacks
    left out.
    """
    what = f"can not begin with {path}"
    opened: list[TensorReader] = []
    together(what, lambda: opened.append(open_reader(path, config, compare_warm_start)))
    [reader] = opened
    model = state_dict.model_state(stages)
    built: state_dict.Shapes = {}
    for shapes in together(what, lambda: state_dict.tensor_shapes(model)):
        built |= shapes
    new = tuple(f"exits.{b}." for b in set(config.exits.boundaries) - _exits_of(reader))
    present = _present(config, built, new)
    together(what, lambda: compare_tensors(reader, present, {}))
    together(what, lambda: check_unread(reader, present.keys() - built.keys()))

    def fill() -> None:
        for shard in model.values():
            if not shard.key.startswith(new):
                read_under(reader, shard, shard.key)

    together(what, fill)
    lacking = {path: shard for path, shard in model.items() if shard.key.startswith(new)}
    return WarmStart(reader, lacking)


def _exits_of(reader: TensorReader) -> set[int]:
    return set(reader.config().exits.boundaries)


def _present(config: Config, built: state_dict.Shapes, new: tuple[str, ...]) -> state_dict.Shapes:
    whole = built | state_dict.unbuilt_shapes(config, built)
    return {name: shape for name, shape in whole.items() if not name.startswith(new)}


def _untouched_temperatures(saved: Config, current: Config) -> Pairs:
    """Exits that are not tuned are to compute what they did."""
    old, new = (
        dict(zip(config.exits.boundaries, config.exits.temperatures, strict=True))
        for config in (saved, current)
    )
    left = [b for b in old if b in new and b not in current.built_exits]
    return [(f"exits.temperatures at {b}", old[b], new[b]) for b in left]


def compare_warm_start(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError unless `current` describes the saved model, or that with more exits."""
    pairs = model_pairs(saved, current)
    if saved.exits.boundaries:
        pairs += exit_pairs(saved, current, ("head", "output"))
        pairs += _untouched_temperatures(saved, current)
    refuse_different(pairs, source)
    gone = sorted(set(saved.exits.boundaries) - set(current.exits.boundaries))
    if gone:
        kept = sorted({*saved.exits.boundaries, *current.exits.boundaries})
        others = "; those that are not in tuning.exits stay as they are" * current.is_tuning
        raise CheckpointError(
            f"{source} has exits at {list(saved.exits.boundaries)}, of which exits.boundaries = "
            f"{list(current.exits.boundaries)} leaves out {gone}; write {kept}{others}"
        )
    new = set(current.exits.boundaries) - set(saved.exits.boundaries)
    untouched = sorted(new - set(current.built_exits))
    if untouched:
        raise CheckpointError(
            f"{source} has no exits at {untouched}, which tuning.exits = "
            f"{list(current.tuning.exits)} leaves as they are; tune them as well, or leave them "
            "out of exits.boundaries"
        )
