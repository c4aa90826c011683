"""Linear layers whose weights have 8 bits: less memory for a little accuracy.

Each output of a layer has a scale of its own; what goes in and comes out keeps its dtype. torchao
does it, if it is installed.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ee_llm.errors import RequestError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8Linear:
    """x [t, i] times the transpose of an 8-bit weight made of `weight` [o, i], plus bias [o].

    Raises RequestError if torchao is not there, or if it has no such weights in this dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        check_quantize(weight.dtype)
        self.num_outputs = weight.shape[0]
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        torchao = _torchao()
        torchao.quantize_(module, torchao.Int8WeightOnlyConfig())
        self._product = module
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x)
        return y if self._bias is None else y + self._bias


def check_quantize(dtype: torch.dtype) -> None:
    """Raise RequestError unless weights of this dtype can be had with 8 bits here."""
    _torchao()
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise RequestError(
            f"--quantize int8 with --dtype {name}: torchao has no such weights; take float32 or "
            "bfloat16, or leave --quantize out"
        )


def _torchao() -> Any:
    """Return torchao.quantization; raises RequestError if it can not be imported."""
    # It warns of each of its kernels for GPUs that does not load.
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import torchao.quantization
    except ImportError as error:
        raise RequestError(
            f"--quantize int8 needs torchao ({error}): pip install 'ee-llm[quantize]'"
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return torchao.quantization
