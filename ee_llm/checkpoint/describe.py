"""Configuration options that a checkpoint already states, so that users need not repeat them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_llm.checkpoint.directory import CHECKPOINTS, LATEST, MANIFEST
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config.tuning import DEFAULT_SEQ_LENGTH


def described_options(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, by section, of a checkpoint's model, exits and data.

    The tokenizer is the checkpoint's own copy. The sequence length is the model's context, but at
    most `DEFAULT_SEQ_LENGTH` tokens. Options in `given` take precedence: exits.boundaries may add
    exits, and each existing exit keeps its temperature.

    Raises CheckpointError if the checkpoint cannot be read.
    """
    reader = TensorReader(path)
    saved = reader.config()
    options: dict[str, Any] = {
        "model": saved.model.model_dump(),
        "data": {
            "tokenizer": reader.tokenizer(),
            "seq_length": min(DEFAULT_SEQ_LENGTH, saved.model.max_seq_length),
        },
    }
    data = given.get("data")
    has_tokenizer = isinstance(data, Mapping) and "tokenizer" in data
    if saved.data.eos_token is not None and not has_tokenizer:
        options["data"]["eos_token"] = saved.data.eos_token
    if not saved.exits.boundaries:
        return options
    section = given.get("exits")
    requested = section.get("boundaries") if isinstance(section, Mapping) else None
    boundaries = saved.exits.boundaries
    if requested == "all":
        boundaries = tuple(range(1, saved.model.num_layers))
    # The configuration that receives these options rejects any other value.
    if isinstance(requested, list | tuple) and all(isinstance(b, int) for b in requested):
        boundaries = tuple(requested)
    known = dict(zip(saved.exits.boundaries, saved.exits.temperatures, strict=True))
    options["exits"] = {
        "boundaries": boundaries,
        "head": saved.exits.head,
        "output": saved.exits.output,
        "temperatures": tuple(known.get(boundary, 1.0) for boundary in boundaries),
    }
    return options


def tokenizer_spec(tokenizer: str) -> str:
    """Return `tokenizer`, or the path of the tokenizer in it if it is a checkpoint or a run.

    Raises CheckpointError if the checkpoint cannot be read.
    """
    path = Path(tokenizer)
    if not any((path / name).exists() for name in (MANIFEST, CHECKPOINTS, LATEST)):
        return tokenizer
    return TensorReader(path).tokenizer()
