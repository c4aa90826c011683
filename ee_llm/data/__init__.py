"""Training data: tokenizers, prepared token files, sample order and microbatches.

Importing the package is cheap: only `batches` needs torch, and it is imported on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ee_llm.data.batches import Microbatch

__all__ = ["Microbatch"]


def __getattr__(name: str) -> Any:
    if name == "Microbatch":
        from ee_llm.data.batches import Microbatch

        return Microbatch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
