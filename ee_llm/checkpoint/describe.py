"""What a checkpoint says about its model, so that a configuration need not say it again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_llm.checkpoint.directory import CHECKPOINTS, LATEST, MANIFEST
from ee_llm.checkpoint.read import TensorReader
from ee_llm.config.tuning import DEFAULT_SEQ_LENGTH


def described_options(path: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, by section, of a checkpoint's model, its exits and its data.

    The tokenizer is the checkpoint's own copy. Sequences have the model's context, but no more than
    `DEFAULT_SEQ_LENGTH` tokens. `given` are options that take precedence: exits may be added in
    exits.boundaries, and each keeps its temperature.

    Raises CheckpointError if the checkpoint can not be read.
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
    asked = section.get("boundaries") if isinstance(section, Mapping) else None
    boundaries = saved.exits.boundaries
    # Anything else is refused by the configuration that these become a part of.
    if isinstance(asked, list | tuple) and all(isinstance(number, int) for number in asked):
        boundaries = tuple(asked)
    known = dict(zip(saved.exits.boundaries, saved.exits.temperatures, strict=True))
    options["exits"] = {
        "boundaries": boundaries,
        "head": saved.exits.head,
        "output": saved.exits.output,
        "temperatures": tuple(known.get(boundary, 1.0) for boundary in boundaries),
    }
    return options


def tokenizer_spec(tokenizer: str) -> str:
    """Return `tokenizer` with a checkpoint, or run directory, replaced by the tokenizer in it.

    Raises CheckpointError for a checkpoint that cannot be read.
    """
    path = Path(tokenizer)
    if not any((path / name).exists() for name in (MANIFEST, CHECKPOINTS, LATEST)):
        return tokenizer
    return TensorReader(path).tokenizer()
