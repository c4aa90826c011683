"""A checkpoint that is to be written, described by another: its tensors come one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ee_llm.checkpoint.format.quantized import refuse_quantized
from ee_llm.checkpoint.read import OPTIMIZER_PREFIX, RNG, TensorReader
from ee_llm.checkpoint.tokenizer import companions
from ee_llm.checkpoint.write import Blocks, TensorSpec, write_checkpoint
from ee_llm.config import Config

OPTIMIZER = f"{OPTIMIZER_PREFIX}state."
"""What the name of a tensor of the optimizer begins with; its kind and the parameter's follow."""


@dataclass
class Rewrite:
    """A checkpoint to be made of the one that `reader` opened.

    config: of the model as it is to be. specs: its tensors, those of the optimizer too; `get` makes
    one. goes_on: whether a run can go on from it as from the other, with the optimizer's state.
    facts: more for the manifest. blocks: see `write_checkpoint`. notes: what to tell the user.
    """

    reader: TensorReader
    config: Config
    specs: dict[str, TensorSpec]
    get: Callable[[str], Tensor]
    goes_on: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: Blocks | None = None
    notes: list[str] = field(default_factory=list)


def copy_of(reader: TensorReader) -> Rewrite:
    """Return the checkpoint as it is, the optimizer's state included.

    Raises CheckpointError for one that is to decode with alone.
    """
    refuse_quantized(reader)
    return Rewrite(reader, reader.config(), specs_of(reader), reader.tensor)


def model_copy_of(reader: TensorReader) -> Rewrite:
    """Return the checkpoint as it is, or of the tuning of exits the model alone.

    An optimizer that has a part of the parameters, as that of tuning, is left out: neither a run
    nor the tuning could go on with it. Raises CheckpointError as `copy_of` does.
    """
    whole = copy_of(reader)
    whole = replace(whole, config=model_of(whole.config))
    have = {parameter_of(name) for name in reader.names(optimizer=True)}
    if not have or have >= set(reader.names()):
        return whole
    specs = {name: spec for name, spec in whole.specs.items() if name == parameter_of(name)}
    note = "the optimizer has a part of the parameters alone, and is left out"
    return replace(whole, specs=specs, goes_on=False, notes=[note])


def specs_of(reader: TensorReader) -> dict[str, TensorSpec]:
    """Return the shape and dtype of every tensor, the optimizer's behind the model's."""
    names = (*reader.names(), *reader.names(optimizer=True))
    return {name: TensorSpec(tuple(reader.shape(name)), reader.dtype(name)) for name in names}


def parameter_of(name: str) -> str:
    """Return the parameter that a tensor belongs to: itself, or what the optimizer has it for."""
    return name.removeprefix(OPTIMIZER).partition(".")[2] if name.startswith(OPTIMIZER) else name


def with_options(config: Config, **sections: Mapping[str, Any]) -> Config:
    """Return a configuration with some options changed, by section; raises ConfigError."""
    values = config.model_dump()
    for section, options in sections.items():
        values[section] |= options
    return Config(**values)


def model_of(config: Config) -> Config:
    """Return the configuration of the whole model, if `config` is of the tuning of its exits.

    Tuning spreads the layers up to the last exit that it trains over the ranks; the model that
    comes of it has the default layout.
    """
    if not config.is_tuning:
        return config
    values = config.model_dump(exclude={"tuning", "parallel"})
    return Config(**values)


def _generators(reader: TensorReader) -> dict[str, bytes]:
    """Return the files of random generators that the manifest names, no links among them."""
    names = [name for name in sorted(reader.manifest["files"]) if name.startswith(f"{RNG}/")]
    return {
        name: reader.checksums.read(name) for name in names if not (reader.path / name).is_symlink()
    }


def write_rewrite(
    rewrite: Rewrite, output: str | Path, on_tensor: Callable[[str, int], None] | None = None
) -> Path:
    """Return the checkpoint in the run directory `output`, whole or not there at all.

    Its place in the training data, the generators of its ranks, its tokenizer and what else came
    with the model are those of the original. Raises CheckpointError as `write_checkpoint` does.
    """
    reader = rewrite.reader
    files = companions(reader.path) | (_generators(reader) if rewrite.goes_on else {})
    facts: dict[str, Any] = {}
    if rewrite.goes_on:
        # The layout that saved stays: it is the one that the generators are for.
        stages = {"stages": reader.config().parallel.num_stages}
        facts = {
            "optimizer_steps": reader.manifest["optimizer_steps"],
            "layout": stages | reader.manifest["layout"],
        }
    return write_checkpoint(
        output,
        rewrite.config,
        rewrite.specs,
        rewrite.get,
        tokenizer_file=reader.tokenizer(),
        state=reader.state() if rewrite.goes_on else None,
        facts=facts | rewrite.facts,
        files=files,
        on_tensor=on_tensor,
        blocks=rewrite.blocks,
    )
