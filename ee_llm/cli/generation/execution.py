"""Check the options of an engine, and load a model with them."""

from typing import Any

from ee_llm import distributed
from ee_llm.checkpoint.read import TensorReader
from ee_llm.cli.generation.options import ExecutionOptions
from ee_llm.config import Config
from ee_llm.errors import UserError
from ee_llm.inference.execution.quantization import check_quantize
from ee_llm.inference.execution.stage import check_layout
from ee_llm.inference.llm import LLM

# Far more than is useful. Larger values overflow lists, tensors or timeouts.
_MAXIMA: dict[str, int] = {
    "tensor": 2**16,
    "pipeline": 2**16,
    "max_num_seqs": 2**14,
    "cache_tokens": 2**40,
    "timeout_s": 10**6,
}


def check_execution(options: ExecutionOptions) -> Config:
    """Return the configuration of the model, before any process is started.

    Raises:
        UserError: An option is out of range, or does not fit the model, the ranks of a launcher or
            the devices of this machine.
    """
    for name, maximum in _MAXIMA.items():
        value = getattr(options, name)
        if not 1 <= value <= maximum:  # refuses NaN, too
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value} is out of range. Use 1 to {maximum:,}.")
    num_ranks, started = options.tensor * options.pipeline, distributed.launched_world_size()
    if started is not None and started != num_ranks:
        raise UserError(
            f"--tensor {options.tensor} x --pipeline {options.pipeline} do not fit WORLD_SIZE ="
            f" {started} in the environment. Start {num_ranks} ranks, or unset it."
        )
    if options.quantize != "none":
        check_quantize(distributed.dtype_named(options.dtype))
    config = TensorReader(options.checkpoint).config()
    check_layout(config, options.tensor, options.pipeline)
    if started is None:
        distributed.check_gpus(options.tensor, options.pipeline)
    return config


def load_model(options: ExecutionOptions, **changes: Any) -> LLM:
    """Return the model with its engine. `changes` are arguments of `LLM` that replace options."""
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "tensor": options.tensor,
        "pipeline": options.pipeline,
        "max_num_seqs": options.max_num_seqs,
        "cache_tokens": options.cache_tokens,
        "attention": options.attention,
        "cuda_graphs": options.cuda_graphs,
        "compile": options.compile,
        "quantize": options.quantize,
        "chat_template": options.chat_template,
        "timeout_s": options.timeout_s,
    }
    return LLM(options.checkpoint, **(arguments | changes))
