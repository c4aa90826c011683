"""Prepare a run: read the configuration of tuning, and refuse what cannot succeed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_llm.config import Config, load_config, read_options
from ee_llm.config.limits import MAX_RANKS
from ee_llm.errors import ConfigError


def load_tuning_config(
    path: str | Path | None = None, overrides: Mapping[str, object] | None = None
) -> Config:
    """Return the configuration of a tuning run.

    The checkpoint of tuning.checkpoint says what neither the file nor `overrides` say about the
    model, its exits and its tokenizer.

    Args:
        path: A TOML file.
        overrides: Options by dotted name or section, which take precedence.

    Raises:
        ConfigError: The configuration is not valid, or has no tuning.checkpoint.
        CheckpointError: The checkpoint cannot be read.
    """
    given = read_options(path, overrides)
    section = given.get("tuning")
    checkpoint = section.get("checkpoint") if isinstance(section, dict) else None
    if not checkpoint:
        raise ConfigError(
            "tuning.checkpoint: not given. Name a checkpoint, or a run directory, with the model "
            "whose exits to tune."
        )
    below: dict[str, Any] = {}
    if isinstance(checkpoint, str):  # else the configuration refuses it
        from ee_llm.checkpoint.describe import described_options

        below = described_options(checkpoint, given)
    return load_config(path, overrides, below)


def prepare(config: Config, num_processes: int | None = None) -> Config:
    """Return the configuration that the ranks of a run use, after all checks that need no rank.

    Where data.tokenizer names a checkpoint, the result names the tokenizer in it.

    Args:
        config: The configuration as given.
        num_processes: The number of ranks to start on this machine; None if this process is a rank.

    Raises:
        ConfigError: The run would fail at its start.
        CheckpointError: data.tokenizer names a checkpoint that cannot be read.
    """
    config = _with_tokenizer(config)
    _check_start(config, num_processes)
    return config


def _with_tokenizer(config: Config) -> Config:
    if not Path(config.data.tokenizer).is_dir():
        return config
    from ee_llm.checkpoint.describe import tokenizer_spec

    values = config.model_dump()
    values["data"]["tokenizer"] = tokenizer_spec(config.data.tokenizer)
    return load_config(None, values)


def _check_start(config: Config, num_processes: int | None) -> None:
    from ee_llm import distributed
    from ee_llm.pipeline.selection import select_fills

    if num_processes is not None and "WORLD_SIZE" in os.environ:
        raise ConfigError(
            f"nproc = {num_processes} within a launcher that already started "
            f"{os.environ['WORLD_SIZE']} processes (WORLD_SIZE). Leave nproc out."
        )
    world_size = distributed.launched_world_size()
    is_number = type(num_processes) is int and 1 <= num_processes <= MAX_RANKS
    if num_processes is not None and not is_number:
        raise ConfigError(
            f"nproc = {num_processes!r} is not a number of processes. Use 1 to {MAX_RANKS:,}."
        )
    if not config.data.prefixes:
        raise ConfigError(
            "data.prefixes = [] names no data to train on. Prepare data with 'ee-llm data "
            "prepare' and give its --output here."
        )
    config.num_microbatches(num_processes or world_size or 1)
    select_fills(config)
