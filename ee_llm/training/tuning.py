"""Runs that begin with a checkpoint: what exits begin with that it lacks, and what is tuned."""

from collections.abc import Callable

from ee_llm.checkpoint.begin import Beginning
from ee_llm.checkpoint.shards import read_under
from ee_llm.config import Config
from ee_llm.training.parallel import ParallelModel

# Changes the values of the exits that the checkpoint lacks, which are those that a new model is
# drawn with; called on all ranks.
Initialization = Callable[[Beginning, ParallelModel], None]


def copy_from_model(beginning: Beginning, model: ParallelModel) -> None:
    """Give exits the values of the model's parts that they resemble (EE-Tuning, 2402.00518)."""
    for shard in beginning.lacking.values():
        if source := copied_name(shard.key, model.config):
            read_under(beginning.reader, shard, source)


def copied_name(name: str, config: Config) -> str | None:
    """Return the parameter of the model that an exit's parameter `name` is copied from.

    The norm is the final one, the output weight that of the final exit. An `mlp` that stands in for
    that of its layer is that MLP, its norm included, so that the exit begins as the plain one; a
    block is the next layer. An `mlp` behind a block has no counterpart, and None is returned: as
    drawn, it adds little to its input.
    """
    _, boundary, rest = name.split(".", 2)
    if rest.startswith("block."):
        return f"layers.{int(boundary) + 1}.{rest.removeprefix('block.')}"
    if rest.startswith(("mlp.", "mlp_norm.")):
        if "block" in config.exits.head:
            return None
        return f"layers.{boundary}.{rest.replace('mlp_norm.', 'pre_mlp_layernorm.')}"
    if rest.startswith("norm."):
        return f"exits.{config.model.num_layers}.{rest}"
    assert rest == "output.weight", f"{name} is no parameter of an exit"
    return "embedding.word.weight" if config.model.tie_embeddings else rest


def leave_random(beginning: Beginning, model: ParallelModel) -> None:
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
