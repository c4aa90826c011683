"""Import DeepSpeed on first use, without its warnings, for the device of this rank."""

import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

from ee_llm.distributed import devices
from ee_llm.errors import UserError


def deepspeed() -> Any:
    """Return the module deepspeed, configured for this rank's device.

    Raises:
        UserError: The package is not installed or cannot be imported.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.engine = deepspeed needs the package deepspeed, which is not installed. Run "
            'pip install "ee-llm[deepspeed]", or set parallel.engine to megatron.'
        )
    # Without this variable deepspeed would search for hardware and select its own.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if devices.has_cuda() else "cpu")
    _quieten()
    try:
        module = importlib.import_module("deepspeed")
    except Exception as error:  # a missing compiler or CUDA raises more than ImportError
        raise UserError(
            "parallel.engine = deepspeed: the package deepspeed is installed but cannot be "
            f"imported ({type(error).__name__}: {error}). Repair it, or set "
            "parallel.engine to megatron."
        ) from error
    # None of deepspeed's compiled extensions is needed, and one is harmful on a CPU: an all-reduce
    # through shared memory that takes a minute to compile and waits forever for a dead rank.
    # Setting this list keeps deepspeed from searching for compilers.
    module.ops.__compatible_ops__ = {}
    return module


def _quieten() -> None:
    """Silence deepspeed's routine warnings, by module."""
    warnings.filterwarnings("ignore", module=r"deepspeed(\.|$)")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
