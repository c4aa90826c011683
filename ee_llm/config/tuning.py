"""The EE-Tuning section of the configuration."""

from ee_llm.config.base import Integers, PathText, Section, option

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
        "They are neither loaded nor computed, nor are the layers after the last trained exit.",
        shown="exits.boundaries",
    )
