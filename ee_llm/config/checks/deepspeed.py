"""Checks of `deepspeed.*` against the other sections."""

from collections.abc import Iterator

from ee_llm.config.schema import ConfigFields


def deepspeed_problems(config: ConfigFields) -> Iterator[str]:
    """Yield a line for each option that does not go with DeepSpeed where that is asked for."""
    deepspeed, parallel = config.deepspeed, config.parallel
    if parallel.engine != "deepspeed":
        return  # the section may stay in a file whose engine is changed
    yield from _data_parallel_alone(config)
    if config.training.dtype == "float64":
        yield (
            "training.dtype = float64 with parallel.engine = deepspeed, whose optimizers compute "
            "in float32; set the first to float32 or bfloat16, or the second to megatron"
        )
    if config.training.dtype == "bfloat16" and deepspeed.zero_stage == 1:
        yield (
            "deepspeed.zero_stage = 1 with training.dtype = bfloat16, for which DeepSpeed has an "
            "optimizer of another kind, whose gradient norm is not ours; set the first to 2, which "
            "takes less memory, or the second to float32"
        )
    if config.logging.trace_steps:
        yield (
            f"logging.trace_steps = {list(config.logging.trace_steps)} traces the actions of a "
            "pipeline, and with parallel.engine = deepspeed there are none; leave it out"
        )


def _data_parallel_alone(config: ConfigFields) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pipeline > 1:
        reason = (
            "splits gradients during each backward pass, while a pipeline still adds those of "
            "other microbatches to them and sums weights that several stages share"
        )
        if config.deepspeed.zero_stage == 1:
            reason = "runs the whole model forward and backward on each process"
        yield (
            f"parallel.pipeline = {parallel.pipeline} with parallel.engine = deepspeed and "
            f"deepspeed.zero_stage = {config.deepspeed.zero_stage}, which {reason}; set "
            "parallel.pipeline to 1, or parallel.engine to megatron"
        )
    if parallel.tensor > 1:
        yield (
            f"parallel.tensor = {parallel.tensor} with parallel.engine = deepspeed, which is data "
            "parallel alone: gradients that tensor ranks share have to be summed before it splits "
            "them; set parallel.tensor to 1, or parallel.engine to megatron"
        )
