"""The DeepSpeed section of the configuration."""

from typing import Literal

from ee_llm.config.base import Section, option


class DeepSpeedConfig(Section):
    """ZeRO sharding over data-parallel ranks, for parallel.engine = "deepspeed" (1910.02054)."""

    zero_stage: Literal[1, 2, 3] = option(
        2,
        "ZeRO stage. 1 shards the optimizer state, 2 also gradients, 3 also parameters.",
    )
    offload_optimizer: bool = option(
        False, "Keep the optimizer state and update parameters in CPU memory."
    )
