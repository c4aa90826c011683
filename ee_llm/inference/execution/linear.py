"""Linear layers whose weights are packed once for many calls with few rows."""

import torch
import torch.nn.functional as F
from torch import Tensor


def is_packable(weight: Tensor) -> bool:
    """Return whether oneDNN can pack this weight: on a CPU, in a dtype that this CPU supports."""
    is_built = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if not is_built or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:  # needs AVX-512 or AVX-NE-CONVERT, which many CPUs lack
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class Linear:
    """Multiply x [t, i] by the transpose of weight [o, i] and add bias [o].

    On a CPU the weight is packed into oneDNN's own layout, which halves the time of passes of two
    to eight rows: the plain product is slow for few rows, and reorders bfloat16 in every call. With
    packs=False the weight stays as it is, since torch.compile cannot trace a packed weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, packs: bool = True) -> None:
        self.num_outputs = weight.shape[0]
        self._bias = bias
        self._is_packed = packs and is_packable(weight)
        self._weight = _pack(weight) if self._is_packed else weight

        self._plain: Tensor | None = None

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the rows [.., i] of the weight for some outputs [..]."""
        if self._plain is None:  # A packed weight has no rows, so a copy is kept from here on.
            self._plain = self._weight.to_dense() if self._is_packed else self._weight
        return self._plain[outputs]

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
