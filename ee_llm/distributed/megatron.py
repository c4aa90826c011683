"""Prepares for megatron-core: checks versions, quietens it, adapts it where CUDA is absent."""

import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings

import torch
from packaging.version import Version

from ee_llm.distributed import devices
from ee_llm.errors import RunError

# Inclusive lower, exclusive upper bounds of what the test suite was run with.
TESTED = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.14"),
    "megatron-core": ("0.16.1", "0.17"),
}
_enabled = False


def check_versions(found: dict[str, str]) -> None:
    """Raise RunError if a version in `found` (name -> version) is outside the tested range."""
    for name, (low, high) in TESTED.items():
        version = Version(Version(found[name]).base_version)
        if not Version(low) <= version < Version(high):
            mend = (
                "use another interpreter"
                if name == "python"
                else f'pip install "{name}>={low},<{high}"'
            )
            raise RunError(
                f"{name} {found[name]} is outside the tested range >={low},<{high}; {mend} "
                "(EE_LLM_UNTESTED_VERSIONS=1 tries it all the same)"
            )


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        low, high = TESTED[name]
        raise RunError(f'{name} is not installed; pip install "{name}>={low},<{high}"') from None


def check_checkpoint_dependencies() -> None:
    """Raise RunError where psutil is missing: megatron-core's saving would hang for ever."""
    if importlib.util.find_spec("psutil") is None:
        raise RunError(
            "psutil is not installed, and without it megatron-core never finishes saving a "
            "checkpoint; pip install psutil"
        )


def enable() -> None:
    """Prepare the process for importing `megatron.core`; call it before, any number of times.

    Raises RunError for an untested version of Python, torch or megatron-core, and where
    megatron-core or what its checkpoints need is missing.
    """
    global _enabled
    if _enabled:
        return
    if os.environ.get("EE_LLM_UNTESTED_VERSIONS") != "1":
        check_versions(
            {
                "python": ".".join(map(str, sys.version_info[:3])),
                "torch": torch.__version__,
                "megatron-core": _installed_version("megatron-core"),
            }
        )
    check_checkpoint_dependencies()
    _quieten()
    if not devices.has_cuda():
        from ee_llm.distributed import cpu_megatron

        cpu_megatron.install()
    _enabled = True


def _quieten() -> None:
    """Silence megatron-core's routine warnings at the modules that raise them."""
    # Its sequence-parallel linears warn unless the CUDA queue is a single one.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", module=r"megatron\.core(\.|$)")
    # Raised while megatron-core is imported and attributed to others: one names the importer of a
    # module of its own that it still uses, one comes from a torch module that it pulls in.
    warnings.filterwarnings(
        "ignore", r"\s*The 'megatron\.core\.[\w.]+'\s+module is deprecated", DeprecationWarning
    )
    warnings.filterwarnings(
        "ignore", "`torch.jit.script_method`", DeprecationWarning, r"torch\.jit\._script$"
    )
    for module in ("torch.distributed.c10d_logger", "torch.distributed.checkpoint"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module.replace(".", r"\."))
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    # It warns of an optimizer without parameters, which a stage without trained ones has.
    logging.getLogger("megatron.core.dist_checkpointing.optimizer").setLevel(logging.ERROR)
