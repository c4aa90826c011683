"""Runs that begin with a checkpoint: what exits begin with that it lacks, and what is tuned."""

from collections.abc import Callable

from ee_llm.architecture.initial_values import copy_source
from ee_llm.checkpoint.sharded.shard_reader import read_under
from ee_llm.checkpoint.warm_start import WarmStart
from ee_llm.config import Config
from ee_llm.training.parallel import ParallelModel

# Changes the values of the exits that the checkpoint lacks, which are those that a new model is
# drawn with; called on all ranks.
Initialization = Callable[[WarmStart, ParallelModel], None]


def copy_from_model(beginning: WarmStart, model: ParallelModel) -> None:
    """Give exits the values of the model's parts that they resemble (EE-Tuning, 2402.00518)."""
    for shard in beginning.lacking.values():
        if source := copy_source(shard.key, model.config):
            read_under(beginning.reader, shard, source)


def leave_random(beginning: WarmStart, model: ParallelModel) -> None:
    """Leave exits as they were drawn."""


INITIALIZATIONS: dict[str, Initialization] = {"copy": copy_from_model, "random": leave_random}


def tuned_part(config: Config) -> str:
    """Return in one line what a tuning run trains, and what it leaves out."""
    exits = config.exits
    parts = [*exits.head, *["output weight"] * (exits.output == "own")]
    others = {
        "own": "",
        "tied": "; their output weight is the embedding's, which is frozen (exits.output = tied)",
        "shared": "; their output weight is the final exit's, which is frozen (exits.output = "
        "shared)",
    }
    return (
        f"tuning exits at {list(config.tuning.exits)}: {', '.join(parts)}{others[exits.output]}; "
        f"{config.depth} of {config.model.num_layers} layers are computed"
    )
