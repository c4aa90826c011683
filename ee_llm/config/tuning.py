"""EE-Tuning's section of the configuration, and what has to agree with it."""

from ee_llm.config.base import Integers, PathText, Section, option

DEFAULT_SEQ_LENGTH = 2048
"""Longest sequence, in tokens, that a model is tuned on unless more is asked for.

The time and memory of attention grow with the square of the length, and a model's context may have
a million tokens.
"""


class TuningConfig(Section):
    """EE-Tuning (`ee-llm tune`): exits are trained, all else stays as a checkpoint has it."""

    checkpoint: PathText | None = option(
        None,
        "Checkpoint, or run directory, with the model whose exits are tuned.",
        shown="none",
        min_length=1,
    )
    exits: Integers = option(
        (),
        "Boundaries of the exits that are trained. Others of exits.boundaries stay as they are and "
        "are neither loaded nor computed; nor are layers behind the last one trained.",
        shown="exits.boundaries",
    )
