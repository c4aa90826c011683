"""The EE-Tuning section of the configuration."""

from typing import Literal

from ee_llm.config.base import Integers, PathText, Section, option
from ee_llm.config.limits import MAX_FACTOR

DEFAULT_SEQ_LENGTH = 2048
"""Default maximum of the sequence length for tuning, in tokens.

The time and memory of attention grow with the square of the length, and the context length of a
model can be a million tokens.
"""


class TuningConfig(Section):
    """EE-Tuning (`ee-llm tune`): train exits of a checkpoint's model and freeze the rest."""

    checkpoint: PathText | None = option(
        None,
        "Checkpoint or run directory with the model whose exits to tune.",
        shown="none",
        min_length=1,
    )
    exits: Integers = option(
        (),
        "Boundaries of the exits to train. The other exits in exits.boundaries stay unchanged. "
        "They are neither loaded nor computed.",
        shown="exits.boundaries",
    )
    objective: Literal["labels", "distill", "both"] = option(
        "labels",
        "Loss of the exits. labels: cross entropy with the next token. distill: the divergence "
        "(KL) of the exit's distribution from the final exit's, for which each step runs all "
        "layers. both: their sum.",
    )
    temperature: float = option(
        1.0,
        "Divisor of the logits of both distributions in the divergence. Above 1, less probable "
        "tokens count more.",
        ge=1 / MAX_FACTOR,
        le=MAX_FACTOR,
    )
