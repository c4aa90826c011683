"""Linear layers with packed weights against the plain product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.inference.execution import linear
from ee_llm.inference.execution.linear import Linear, is_packable

NUM_ROWS = [*range(1, 18), 31, 32, 33, 64, 70]


def _numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(48, 32), (7, 13), (1, 64)])
@torch.no_grad()
def test_the_product_is_right_for_any_number_of_rows(
    num_outputs: int, num_inputs: int, dtype: torch.dtype, tolerance: float, with_bias: bool
) -> None:
    """Compare with the float64 product of the same rounded numbers, relative to the largest."""
    weight = _numbers(num_outputs, num_inputs, dtype=dtype)
    bias = _numbers(num_outputs, dtype=dtype) if with_bias else None
    product = Linear(weight, bias)
    assert product.num_outputs == num_outputs
    rows = _numbers(max(NUM_ROWS), num_inputs, dtype=dtype)
    expected = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    scale = float(expected.abs().max())
    for num_rows in NUM_ROWS:
        found = product(rows[:num_rows])
        assert found.dtype == dtype
        assert found.shape == (num_rows, num_outputs)
        error = (found.double() - expected[:num_rows]).abs().max()
        assert float(error) <= tolerance * scale, num_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    product = Linear(_numbers(48, 32, dtype=dtype))
    assert product(torch.empty(0, 32, dtype=dtype)).shape == (0, 48)


@torch.no_grad()
def test_a_weight_may_be_a_slice() -> None:
    """A tensor-parallel rank has slices, which are not contiguous in memory."""
    full = _numbers(32, 64, dtype=torch.float32)
    x = _numbers(5, 32, dtype=torch.float32)
    torch.testing.assert_close(Linear(full[:, 32:])(x), x @ full[:, 32:].T)


def test_weights_are_packed_where_supported() -> None:
    """Otherwise the test above would compare the plain product with itself."""
    is_built = torch.backends.mkldnn.is_available()
    is_bfloat16_supported = is_built and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert is_packable(torch.empty(4, 4)) == is_built
    assert is_packable(torch.empty(4, 4, dtype=torch.bfloat16)) == is_bfloat16_supported
    assert not is_packable(torch.empty(4, 4, dtype=torch.float64))
    assert not is_packable(torch.empty(4, 4, dtype=torch.float32, device="meta"))


@pytest.mark.parametrize(
    ("owner", "name", "dtype"),
    [
        (torch.backends.mkldnn, "is_available", torch.float32),
        # oneDNN raises an error when it packs a bfloat16 weight on a CPU without support.
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported", torch.bfloat16),
    ],
    ids=["without onednn", "without bfloat16"],
)
@torch.no_grad()
def test_without_support_the_product_is_plain(monkeypatch, owner, name, dtype) -> None:
    monkeypatch.setattr(owner, name, lambda: False)
    monkeypatch.setattr(linear, "_pack", lambda weight: pytest.fail("it cannot be packed"))
    weight, x = (_numbers(n, 32, dtype=dtype) for n in (48, 3))
    assert torch.equal(Linear(weight)(x), F.linear(x, weight))
