"""Describes a new checkpoint derived from another one, and writes it tensor by tensor."""

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
"""The prefix of the names of optimizer tensors. The kind and the parameter's name follow."""


@dataclass
class Rewrite:
    """A checkpoint to write, derived from the one of `reader`.

    config: the configuration of the new checkpoint.
    specs: its tensors, including those of the optimizer.
    get: returns a tensor by name.
    is_resumable: whether a run can resume from it, with the optimizer's state.
    facts: further entries of the manifest.
    blocks: see `write_checkpoint`.
    notes: messages to the user.
    """

    reader: TensorReader
    config: Config
    specs: dict[str, TensorSpec]
    get: Callable[[str], Tensor]
    is_resumable: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    blocks: Blocks | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())


def copy_of(reader: TensorReader) -> Rewrite:
    """Return an unchanged copy of the checkpoint, including the optimizer's state.

    Raises CheckpointError for a quantized checkpoint.
    """
    refuse_quantized(reader)
    return Rewrite(reader, reader.config(), specs_of(reader), reader.tensor)


def model_copy_of(reader: TensorReader) -> Rewrite:
    """Return a copy of the checkpoint, or of only its model if it is from a tuning run.

    The state of an optimizer that covers only a part of the parameters, such as that of a tuning
    run, is omitted, because no run could resume with it. Raises CheckpointError for a quantized
    checkpoint.
    """
    whole = copy_of(reader)
    whole = replace(whole, config=model_of(whole.config))
    optimized = {parameter_of(name) for name in reader.names(optimizer=True)}
    if not optimized or optimized >= set(reader.names()):
        return whole
    specs = {name: spec for name, spec in whole.specs.items() if name == parameter_of(name)}
    note = "The optimizer state is omitted because it covers only a part of the parameters."
    return replace(whole, specs=specs, is_resumable=False, notes=[note])


def specs_of(reader: TensorReader) -> dict[str, TensorSpec]:
    """Return the shape and dtype of every tensor, the model's before the optimizer's."""
    names = (*reader.names(), *reader.names(optimizer=True))
    return {name: TensorSpec(tuple(reader.shape(name)), reader.dtype(name)) for name in names}


def parameter_of(name: str) -> str:
    """Return the name of the parameter to which a tensor of the model or optimizer belongs."""
    return name.removeprefix(OPTIMIZER).partition(".")[2] if name.startswith(OPTIMIZER) else name


def with_options(config: Config, **sections: Mapping[str, Any]) -> Config:
    """Return a configuration with some options changed, by section; raises ConfigError."""
    values = config.model_dump()
    for section, options in sections.items():
        values[section] |= options
    return Config(**values)


def model_of(config: Config) -> Config:
    """Return the configuration of the whole model, without the options of tuning.

    A tuning run divides only the layers up to its last exit among the ranks, so the whole model
    gets the default layout.
    """
    if not config.is_tuning:
        return config
    values = config.model_dump(exclude={"tuning", "parallel"})
    return Config(**values)


def _generators(reader: TensorReader) -> dict[str, bytes]:
    """Return the files of random generators that the manifest names, without links."""
    names = [name for name in sorted(reader.manifest["files"]) if name.startswith(f"{RNG}/")]
    return {
        name: reader.checksums.read(name) for name in names if not (reader.path / name).is_symlink()
    }


@dataclass(frozen=True)
class RewriteResult:
    """A checkpoint that was written; `str` is a summary in one line."""

    output: Path
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()
    """Remarks for the user."""

    def __str__(self) -> str:
        return f"{self.output}: {self.num_tensors} tensors, {self.num_bytes / 2**20:,.1f} MiB"


def write_rewrite(
    rewrite: Rewrite, output: str | Path, on_tensor: Callable[[str, int], None] | None = None
) -> RewriteResult:
    """Write the checkpoint to the run directory `output`, atomically.

    The position in the training data, the random generators of the ranks, the tokenizer and the
    companion files are those of the original. Raises CheckpointError as `write_checkpoint` does.
    """
    reader = rewrite.reader
    files = companions(reader.path) | (_generators(reader) if rewrite.is_resumable else {})
    facts: dict[str, Any] = {}
    if rewrite.is_resumable:
        # Keep the layout that saved the original: the random generators belong to it.
        stages = {"stages": reader.config().parallel.num_stages}
        facts = {
            "optimizer_steps": reader.manifest["optimizer_steps"],
            "layout": stages | reader.manifest["layout"],
        }
    path = write_checkpoint(
        output,
        rewrite.config,
        rewrite.specs,
        rewrite.get,
        tokenizer_file=reader.tokenizer(),
        state=reader.state() if rewrite.is_resumable else None,
        facts=facts | rewrite.facts,
        files=files,
        on_tensor=on_tensor,
        blocks=rewrite.blocks,
    )
    return RewriteResult(path, len(rewrite.specs), rewrite.num_bytes, tuple(rewrite.notes))
