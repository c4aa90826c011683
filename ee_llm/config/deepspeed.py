"""DeepSpeed's section of the configuration, and what has to agree with it."""

from typing import Literal

from ee_llm.config.base import Section, option


class DeepSpeedConfig(Section):
    """What parallel.engine = "deepspeed" splits over data-parallel processes (ZeRO, 1910.02054)."""

    zero_stage: Literal[1, 2, 3] = option(
        2,
        "1 splits the optimizer's state, 2 gradients too, 3 parameters as well.",
    )
    offload_optimizer: bool = option(
        False, "Whether the optimizer's state is kept, and parameters updated, in the CPU's memory."
    )
