"""The options of `ee-llm checkpoint ...`, a class for each command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ee_llm.config import HeadPart


@dataclass(frozen=True)
class InfoOptions:
    """The options of `ee-llm checkpoint info`."""

    checkpoint: Path
    """Checkpoint to read, or a run directory, of which the newest checkpoint is used."""

    tensors: bool = False
    """List all tensors with their dtypes and shapes."""

    verify: bool = False
    """Read the whole checkpoint and compare every file with its checksum. If files are damaged or
    missing, the command names them and fails."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class ReshardOptions:
    """The options of `ee-llm checkpoint reshard`."""

    checkpoint: Path
    """Checkpoint to read, or a run directory, of which the newest checkpoint is used."""

    output: Path
    """Write the result to this new run directory."""

    tensor: int = 1
    """Number of tensor-parallel ranks of the new layout."""

    pipeline: int = 1
    """Number of pipeline-parallel ranks of the new layout."""

    virtual: int = 1
    """Number of stages on each pipeline rank."""

    layer_split: tuple[int, ...] = ()
    """Number of layers of each stage, first to last. (default: an even split)"""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class AddExitsOptions:
    """The options of `ee-llm checkpoint add-exits`."""

    checkpoint: Path
    """Checkpoint to read, or a run directory, of which the newest checkpoint is used."""

    output: Path
    """Write the result to this new run directory."""

    exits: tuple[int, ...]
    """Layers after which to add exits."""

    initialization: Literal["copy", "random", "class-aware"] = "copy"
    """Initialize the new exits in this way. copy: copy each part from the model (its final norm and
    output weight, the MLP of the layer, the next layer). random: as in a new model. class-aware: as
    copy, but the row of a token in the output weight is the mean of the normalized hidden states
    before that token in --data."""

    head: tuple[HeadPart, ...] | None = None
    """Parts of the new exits. (default: as in the checkpoint's exits, else norm)"""

    exit_output: Literal["shared", "own", "tied"] | None = None
    """Output weight of the new exits: shared with the final exit, one of their own each, or tied to
    the word embedding. (default: as in the checkpoint's exits, else own for class-aware and shared
    otherwise)"""

    data: tuple[str, ...] = ()
    """For class-aware: prefixes of prepared data."""

    num_tokens: int | None = None
    """For class-aware: number of tokens to use, from the start of the data. (default: all)"""

    seq_length: int | None = None
    """For class-aware: length of the sequences that the model runs on, in tokens. (default: that of
    training, but at most 2048)"""

    tensor: int = 1
    """For class-aware: number of tensor-parallel ranks to start."""

    timeout_s: float = 600
    """Abort if a rank receives nothing from another rank for this many seconds."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class MoveExitsOptions:
    """The options of `ee-llm checkpoint move-exits`."""

    checkpoint: Path
    """Checkpoint to read, or a run directory, of which the newest checkpoint is used."""

    output: Path
    """Write the result to this new run directory."""

    placement: Literal["post", "pre"]
    """Place the exit after layer b on the stage of layer b (post) or of layer b+1 (pre)."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class RemoveExitsOptions:
    """The options of `ee-llm checkpoint remove-exits`."""

    checkpoint: Path
    """Checkpoint to read, or a run directory, of which the newest checkpoint is used."""

    output: Path
    """Write the result to this new run directory."""

    exits: tuple[int, ...]
    """Layers whose exits to remove."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class AverageOptions:
    """The options of `ee-llm checkpoint average`."""

    checkpoints: tuple[Path, ...]
    """Checkpoints of one run to average, or one run directory with --last."""

    output: Path
    """Write the result to this new run directory."""

    last: int | None = None
    """Average this many newest checkpoints of a run directory."""

    json: bool = False
    """Print one JSON object and nothing else."""
