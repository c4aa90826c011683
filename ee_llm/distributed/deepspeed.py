"""DeepSpeed, imported quietly, for the device of this rank, and only where it is used."""

import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

from ee_llm.distributed import devices
from ee_llm.errors import UserError


def deepspeed() -> Any:
    """Return the module deepspeed, ready for this rank's device.

    Raises UserError, with the mend, where it is not installed or can not be imported.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.engine = deepspeed needs the package deepspeed, which is not installed; "
            'pip install "ee-llm[deepspeed]", or set parallel.engine to megatron'
        )
    # Asked for by its name, or deepspeed would look for hardware of its own choice.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if devices.has_cuda() else "cpu")
    _quieten()
    try:
        module = importlib.import_module("deepspeed")
    except Exception as error:  # of a compiler or a CUDA that it misses, not only ImportError
        raise UserError(
            "parallel.engine = deepspeed: the package deepspeed is installed and can not be "
            f"imported ({type(error).__name__}: {error}); mend it, or set parallel.engine to "
            "megatron"
        ) from error
    # None of its compiled parts is needed, and on a CPU one gets in the way: an all-reduce through
    # shared memory, which is compiled for a minute and waits without end for a rank that died.
    # deepspeed looks for compilers when it is first asked what it can compile: it is told here.
    module.ops.__compatible_ops__ = {}
    return module


def _quieten() -> None:
    """Silence deepspeed's routine warnings at the modules that raise them."""
    warnings.filterwarnings("ignore", module=r"deepspeed(\.|$)")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
