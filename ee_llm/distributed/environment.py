"""Read the environment variables in which a launcher passes the rank and the world size."""

import os

import torch.distributed as dist

from ee_llm.errors import UserError


def launched_world_size() -> int | None:
    """Return the number of ranks that a launcher started, None without a launcher.

    Raises:
        UserError: A variable is missing, is not a number, or contradicts another one.
    """
    names = [name for name in ("WORLD_SIZE", "RANK") if name in os.environ]
    if not names:
        return None
    world_size = _number("WORLD_SIZE", 1) if "WORLD_SIZE" in names else 0
    wanted = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{names[0]} = {os.environ[names[0]]} is set in the environment, but "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not. Unset "
            f"{' and '.join(names)} to run as one process, or let torchrun set all of them."
        )
    rank = _number("RANK", 0)
    if rank >= world_size:
        raise UserError(
            f"RANK = {rank} in the environment is not less than WORLD_SIZE = {world_size}. Ranks "
            "are numbered from 0. Unset both variables, or let torchrun set them."
        )
    _number("MASTER_PORT", 0)
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        if name in os.environ:
            _number(name, least)
    return world_size


def refuse_second_group() -> None:
    """Raise UserError if this process has joined a process group already."""
    if dist.is_initialized():
        raise UserError(
            "This process already uses torch.distributed, as an open LLM with several ranks does."
            " Close the LLM, or use a new process."
        )


def _number(name: str, least: int) -> int:
    value = os.environ[name]
    if not (value.isascii() and value.isdecimal() and least <= int(value) < 2**31):
        raise UserError(
            f"{name} = {value!r} in the environment is not an integer of {least} or more. Unset "
            "it, or let torchrun set it."
        )
    return int(value)
