"""Starts a new run with the parameters of a checkpoint, which may lack some of the exits.

A tuning run (`config.is_tuning`) builds the model up to the last exit that it tunes, and no other
exits. The checkpoint must still have the tensors that the run does not build, in the right shapes,
because the run saves checkpoints of the whole model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.sharded import state_dict
from ee_llm.checkpoint.sharded.agreement import fail_together
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
    """The checkpoint from which a run started.

    reader: The checkpoint.
    lacking: The shards on this rank of exits that the checkpoint lacks. They still have the values
        with which they were built.
    """

    reader: TensorReader
    lacking: state_dict.Flat


def warm_start(
    path: str | Path, stages: Sequence[state_dict.ShardedModule], config: Config
) -> WarmStart:
    """Load the parameters of the stages from a checkpoint, or from the newest one of a run.

    Collective. Raises CheckpointError, before it changes anything, if a file is missing, truncated
    or foreign, if the model, the heads or the tokenizer differ from those of `config`, if the
    checkpoint has an exit that `config` does not have, or if its tensors are not those of the
    model without the exits that it lacks.
    """
    what = f"cannot start from {path}"
    opened: list[TensorReader] = []
    fail_together(what, lambda: opened.append(open_reader(path, config, compare_warm_start)))
    [reader] = opened
    model = state_dict.model_state(stages)
    built: state_dict.Shapes = {}
    for shapes in fail_together(what, lambda: state_dict.tensor_shapes(model)):
        built |= shapes
    new = tuple(f"exits.{b}." for b in set(config.exits.boundaries) - _exits_of(reader))
    present = _present(config, built, new)
    fail_together(what, lambda: compare_tensors(reader, present, {}))
    fail_together(what, lambda: check_unread(reader, present.keys() - built.keys()))

    def fill() -> None:
        for shard in model.values():
            if not shard.key.startswith(new):
                read_under(reader, shard, shard.key)

    fail_together(what, fill)
    lacking = {path: shard for path, shard in model.items() if shard.key.startswith(new)}
    return WarmStart(reader, lacking)


def _exits_of(reader: TensorReader) -> set[int]:
    return set(reader.config().exits.boundaries)


def _present(config: Config, built: state_dict.Shapes, new: tuple[str, ...]) -> state_dict.Shapes:
    whole = built | state_dict.unbuilt_shapes(config, built)
    return {name: shape for name, shape in whole.items() if not name.startswith(new)}


def _untouched_temperatures(saved: Config, current: Config) -> Pairs:
    """Return the temperatures of exits that are not tuned, which must not change."""
    old, new = (
        dict(zip(config.exits.boundaries, config.exits.temperatures, strict=True))
        for config in (saved, current)
    )
    untuned = [b for b in old if b in new and b not in current.built_exits]
    return [(f"exits.temperatures at {b}", old[b], new[b]) for b in untuned]


def compare_warm_start(saved: Config, current: Config, source: Path) -> None:
    """Raise CheckpointError unless `current` is the saved model, possibly with more exits."""
    pairs = model_pairs(saved, current)
    if saved.exits.boundaries:
        pairs += exit_pairs(saved, current, ("head", "output"))
        pairs += _untouched_temperatures(saved, current)
    refuse_different(pairs, source)
    missing = sorted(set(saved.exits.boundaries) - set(current.exits.boundaries))
    if missing:
        union = sorted({*saved.exits.boundaries, *current.exits.boundaries})
        others = " Exits that are not in tuning.exits do not change." * current.is_tuning
        raise CheckpointError(
            f"{source} has exits at {list(saved.exits.boundaries)}, but exits.boundaries = "
            f"{list(current.exits.boundaries)} leaves out {missing}. Set exits.boundaries = "
            f"{union}.{others}"
        )
    new = set(current.exits.boundaries) - set(saved.exits.boundaries)
    untouched = sorted(new - set(current.built_exits))
    if untouched:
        raise CheckpointError(
            f"{source} has no exits at {untouched}, and tuning.exits = "
            f"{list(current.tuning.exits)} does not tune them. Tune them as well, or remove them "
            "from exits.boundaries."
        )
