"""The options of `ee-llm checkpoint ...`, a class for each command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ee_llm.config import HeadPart


@dataclass(frozen=True)
class InfoOptions:
    """Show what is in a checkpoint: the model, its exits, how far it was trained, sizes.

    With --verify, read all of it, and fail if any byte is not what was written.
    """

    checkpoint: Positional[Path]
    """A checkpoint, or the run directory that holds it (then its newest)."""

    tensors: bool = False
    """List all tensors too, with dtypes and shapes."""

    verify: bool = False
    """Compare every file with its checksums, and name those that are damaged or missing."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class ReshardOptions:
    """Cut a checkpoint's blocks for another parallel layout, the optimizer's state included.

    Any layout can go on from any checkpoint without this: tensors are stored whole, and each rank
    picks its part. It is of use before a large run begins with what few ranks, or a conversion,
    wrote: there a rank has to read all of a tensor to take its columns. Afterwards each rank reads
    its own blocks in its own file, and the configuration states the layout.
    """

    checkpoint: Positional[Path]
    """A checkpoint, or the run directory that holds it (then its newest)."""

    output: Path
    """Where the result goes: a new run directory."""

    tensor: int = 1
    """Tensor-parallel ranks that are to read it."""

    pipeline: int = 1
    """Pipeline-parallel ranks."""

    virtual: int = 1
    """Stages of each pipeline rank."""

    layer_split: tuple[int, ...] = ()
    """Number of layers of each stage, first to last; even unless given."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class AddExitsOptions:
    """Add exits to a checkpoint; all else stays bit for bit, the optimizer's state included."""

    checkpoint: Positional[Path]
    """A checkpoint, or the run directory that holds it (then its newest)."""

    output: Path
    """Where the result goes: a new run directory."""

    exits: tuple[int, ...]
    """The layers after which new exits are to be."""

    initialization: Literal["copy", "random", "class-aware"] = "copy"
    """copy: each part of the model's own: the final norm and output weight, the layer's MLP, the
    next layer. random: as a new model's. class-aware: as copy, but an output weight's row is the
    mean of the normalized hidden states before that token, over --data."""

    head: tuple[HeadPart, ...] | None = None
    """What the exits are made of; as those that are there, else a norm."""

    exit_output: Literal["shared", "own", "tied"] | None = None
    """Their output weight: the final exit's, one of their own each, or the word embedding. As
    those that are there, else own for class-aware and shared otherwise."""

    data: tuple[str, ...] = ()
    """For class-aware: prefixes of prepared data."""

    num_tokens: int | None = None
    """For class-aware: tokens to look at, from the beginning of the data; all unless given."""

    seq_length: int | None = None
    """For class-aware: tokens that the model sees at once; those of training, but at most 2048."""

    tensor: int = 1
    """For class-aware: tensor-parallel ranks to start."""

    timeout_s: float = 600
    """Seconds after which a rank that hears nothing from another gives up."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class MoveExitsOptions:
    """Place all exits of a checkpoint before or behind the edges of pipeline stages.

    The model computes the same, and no tensor changes: time and memory of the stages do. The exit
    after layer 6 is on the stage of layer 6 if placed post, on that of layer 7 if placed pre.
    """

    checkpoint: Positional[Path]
    """A checkpoint, or the run directory that holds it (then its newest)."""

    output: Path
    """Where the result goes: a new run directory."""

    placement: Literal["post", "pre"]
    """Where the exits are to be."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class RemoveExitsOptions:
    """Take exits out of a checkpoint, and the optimizer's state of theirs; all else stays."""

    checkpoint: Positional[Path]
    """A checkpoint, or the run directory that holds it (then its newest)."""

    output: Path
    """Where the result goes: a new run directory."""

    exits: tuple[int, ...]
    """The layers whose exits are to go."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class AverageOptions:
    """Average the weights of several checkpoints of one run, without the optimizer's state."""

    checkpoints: Positional[tuple[Path, ...]]
    """Checkpoints; or one run directory, with --last."""

    output: Path
    """Where the result goes: a new run directory."""

    last: int | None = None
    """The number of newest checkpoints of the run to average."""

    json: bool = False
    """Print one JSON object and nothing else."""
