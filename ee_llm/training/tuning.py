"""Initialize exits from a checkpoint, and describe a tuning run."""

import logging
from collections.abc import Callable

from ee_llm.architecture.initial_values import copy_source, is_exit_norm
from ee_llm.checkpoint.sharded import state_dict
from ee_llm.checkpoint.sharded.shard_reader import read_under
from ee_llm.checkpoint.warm_start import WarmStart
from ee_llm.config import Config
from ee_llm.training.parallel import ParallelModel

logger = logging.getLogger(__name__)

# Changes the initial values of the exits that the checkpoint lacks, which are random at first.
# Called on all ranks.
Initialization = Callable[[WarmStart, ParallelModel], None]


def copy_from_model(start: WarmStart, model: ParallelModel) -> None:
    """Initialize exits with the corresponding modules of the model (EE-Tuning, 2402.00518)."""
    for shard in start.lacking.values():
        if source := copy_source(shard.key, model.config):
            read_under(start.reader, shard, source)


def keep_random(start: WarmStart, model: ParallelModel) -> None:
    """Keep the random initial values of exits."""


INITIALIZATIONS: dict[str, Initialization] = {"copy": copy_from_model, "random": keep_random}


def share_norms(start: WarmStart, model: ParallelModel) -> None:
    """Set the norms of all exits to the final norm of the checkpoint (exits.norm = "shared")."""
    before = start.reader.config().exits
    if before.boundaries and before.norm == "own":
        logger.warning(
            "exits.norm = shared: the final norm replaces those of the exits at %s in %s",
            list(before.boundaries),
            start.reader.path,
        )
    for shard in state_dict.model_state(model.stages).values():
        if is_exit_norm(shard.key):
            source = copy_source(shard.key, model.config)
            assert source is not None, f"{shard.key} is copied from the final norm"
            read_under(start.reader, shard, source)


def describe_tuning(config: Config) -> str:
    """Return a line on what a tuning run trains, and how many layers a step computes."""
    exits = config.exits
    parts = [*exits.head, *["output weight"] * (exits.output == "own")]
    output_notes = {
        "own": "",
        "tied": "; their output weight is the embedding's, which is frozen (exits.output = tied)",
        "shared": "; their output weight is the final exit's, which is frozen (exits.output = "
        "shared)",
    }
    objectives = {
        "labels": "",
        "distill": " towards the final exit's distribution",
        "both": " towards the labels and the final exit's distribution",
    }
    return (
        f"tuning exits at {list(config.tuning.exits)}{objectives[config.tuning.objective]}: "
        f"{', '.join(parts)}{output_notes[exits.output]}; a step computes "
        f"{config.depth} of {config.model.num_layers} layers"
    )
