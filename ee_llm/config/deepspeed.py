"""The DeepSpeed section of the configuration."""

from typing import Literal

from ee_llm.config.base import Section, option


class DeepSpeedConfig(Section):
    """Sharding over data-parallel ranks by parallel.engine = "deepspeed" (ZeRO, 1910.02054)."""

    zero_stage: Literal[1, 2, 3] = option(
        2,
        "ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters.",
    )
    offload_optimizer: bool = option(
        False, "Keep optimizer states and update parameters in CPU memory."
    )
