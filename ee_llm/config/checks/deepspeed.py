"""Checks of `deepspeed.*` against the other sections."""

from collections.abc import Iterator

from ee_llm.config.schema import ConfigFields


def deepspeed_problems(config: ConfigFields) -> Iterator[str]:
    """Yield a message for each option that conflicts with parallel.engine = deepspeed."""
    deepspeed, parallel = config.deepspeed, config.parallel
    if parallel.engine != "deepspeed":
        return  # Ignore the section, so that changing the engine needs no other edit of a file.
    yield from _only_data_parallel(config)
    if config.training.dtype == "float64":
        yield (
            "training.dtype = float64 is not possible with parallel.engine = deepspeed, whose "
            "optimizers compute in float32. Set training.dtype to float32 or bfloat16, or "
            "parallel.engine to megatron."
        )
    if config.training.dtype == "bfloat16" and deepspeed.zero_stage == 1:
        yield (
            "deepspeed.zero_stage = 1 is not possible with training.dtype = bfloat16: DeepSpeed "
            "then uses a different optimizer, whose gradient norm differs from ee_llm's. Set "
            "deepspeed.zero_stage to 2, which takes less memory, or training.dtype to float32."
        )
    if config.logging.trace_steps:
        yield (
            f"logging.trace_steps = {list(config.logging.trace_steps)} traces pipeline actions, "
            "but parallel.engine = deepspeed has none. Omit it."
        )


def _only_data_parallel(config: ConfigFields) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pipeline > 1:
        reason = (
            "shards gradients during each backward pass, while a pipeline still accumulates those "
            "of other microbatches and sums the weights that several stages share"
        )
        if config.deepspeed.zero_stage == 1:
            reason = "runs the forward and backward pass of the entire model on each process"
        yield (
            f"parallel.pipeline = {parallel.pipeline} is not possible with parallel.engine = "
            f"deepspeed and deepspeed.zero_stage = {config.deepspeed.zero_stage}, which {reason}. "
            "Set parallel.pipeline to 1, or parallel.engine to megatron."
        )
    if parallel.tensor > 1:
        yield (
            f"parallel.tensor = {parallel.tensor} is not possible with parallel.engine = "
            "deepspeed, which supports only data parallelism: it shards gradients before those "
            "that tensor ranks share are summed. Set parallel.tensor to 1, or parallel.engine to "
            "megatron."
        )
