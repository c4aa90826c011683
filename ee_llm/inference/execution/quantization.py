"""Linear layers with 8-bit weights, by torchao: less memory for a little accuracy.

Each output of a layer has its own scale. Inputs and outputs keep their dtype.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ee_llm.errors import RequestError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8Linear:
    """Multiply x [t, i] by the transpose of `weight` [o, i], rounded to 8 bits, and add bias [o].

    Raises:
        RequestError: torchao is not installed or does not support this dtype.
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

        self._plain: Tensor | None = None

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the rows [.., i] of the rounded weight for some outputs [..]."""
        if self._plain is None:
            self._plain = self._product.weight.dequantize()
        return self._plain[outputs]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x)
        return y if self._bias is None else y + self._bias


def check_quantize(dtype: torch.dtype) -> None:
    """Raise RequestError unless torchao is installed and supports this dtype."""
    _torchao()
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise RequestError(
            f"quantize = 'int8' with dtype = {name!r}: torchao does not support this dtype. Use"
            " dtype = 'float32' or 'bfloat16', or leave out quantize."
        )


def _torchao() -> Any:
    """Return torchao.quantization; raises RequestError if it cannot be imported."""
    # On import, torchao warns about each GPU kernel that it cannot load.
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import torchao.quantization
    except ImportError as error:
        raise RequestError(
            f"quantize = 'int8' needs torchao ({error}). Run: pip install 'ee-llm[quantize]'"
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return torchao.quantization
