"""Prepare the process for megatron-core: check versions, silence warnings, adapt it to a CPU."""

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

# The versions that the test suite runs with: inclusive lower and exclusive upper bounds.
TESTED = {
    "python": ("3.11", "3.13"),
    "torch": ("2.11", "2.14"),
    "megatron-core": ("0.16.1", "0.17"),
}
_enabled = False


def check_versions(installed: dict[str, str]) -> None:
    """Raise RunError if a version in `installed` (name -> version) is outside the tested range."""
    for name, (low, high) in TESTED.items():
        version = Version(Version(installed[name]).base_version)
        if not Version(low) <= version < Version(high):
            fix = (
                "Use another interpreter"
                if name == "python"
                else f'Run pip install "{name}>={low},<{high}"'
            )
            raise RunError(
                f"{name} {installed[name]} is outside the tested range >={low},<{high}. {fix}, or "
                "set EE_LLM_UNTESTED_VERSIONS=1 to try this version."
            )


def _installed_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        low, high = TESTED[name]
        raise RunError(
            f'{name} is not installed. Run pip install "{name}>={low},<{high}".'
        ) from None


def check_checkpoint_dependencies() -> None:
    """Raise RunError if psutil is missing: without it megatron-core hangs when it saves."""
    if importlib.util.find_spec("psutil") is None:
        raise RunError(
            "psutil is not installed. Without it megatron-core never finishes saving a checkpoint. "
            "Run pip install psutil."
        )


def enable() -> None:
    """Prepare the process for importing `megatron.core`. Further calls do nothing.

    Raises:
        RunError: The version of Python, torch or megatron-core is untested, or megatron-core or a
            package that its checkpoints need is missing.
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
    """Silence megatron-core's routine warnings, by module."""
    # Its sequence-parallel linear layers warn unless there is a single CUDA queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", module=r"megatron\.core(\.|$)")
    # Two warnings of its import are attributed to other modules: megatron-core still imports a
    # deprecated module of its own, and it imports a torch module that warns.
    warnings.filterwarnings(
        "ignore", r"\s*The 'megatron\.core\.[\w.]+'\s+module is deprecated", DeprecationWarning
    )
    warnings.filterwarnings(
        "ignore", "`torch.jit.script_method`", DeprecationWarning, r"torch\.jit\._script$"
    )
    for module in ("torch.distributed.c10d_logger", "torch.distributed.checkpoint"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module.replace(".", r"\."))
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    # It warns of an optimizer without parameters, which is normal on a stage without trained ones.
    logging.getLogger("megatron.core.dist_checkpointing.optimizer").setLevel(logging.ERROR)
