"""The gated linear layer compared with the plain formula, forward and backward."""

import pytest
import torch
from torch.nn.functional import silu

from ee_llm import distributed
from ee_llm.config import load_config
from ee_llm.model.activation import SwiGluLinear
from ee_llm.model.specs import transformer_config
from tests.distributed.harness import run_ranks


def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = (hidden @ weight.t()).chunk(2, dim=-1)
    return silu(gate) * up


def make_layer() -> SwiGluLinear:
    distributed.initialize(timeout_s=20)
    config = load_config(None, {"model.shape": "llama-tiny"})
    parts = transformer_config(config, torch.float64)
    layer = SwiGluLinear(
        8,
        12,
        config=parts,
        init_method=parts.init_method,
        bias=False,
        skip_bias_add=True,
        gather_output=False,
    )
    torch.nn.init.normal_(layer.weight)
    return layer


def _compare() -> None:
    layer = make_layer()
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = plain(x, layer.weight)
    actual, bias = layer(x)
    assert bias is None
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn(5, 2, 6, dtype=torch.float64)
    for actual_grad, expected_grad in zip(
        torch.autograd.grad(actual, [x, layer.weight], upstream),
        torch.autograd.grad(expected, [x, layer.weight], upstream),
        strict=True,
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-13, atol=1e-13)


def test_swiglu_equals_the_formula_and_its_gradients() -> None:
    run_ranks(1, _compare)


def _freeze(frozen: str) -> None:
    layer = make_layer()
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=frozen != "input")
    layer.weight.requires_grad_(frozen != "weight")
    out, _ = layer(x)
    out.sum().backward()
    trained, constant = (x, layer.weight) if frozen == "weight" else (layer.weight, x)
    assert constant.grad is None
    (expected,) = torch.autograd.grad(plain(x, layer.weight).sum(), trained)
    torch.testing.assert_close(trained.grad, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_swiglu_computes_only_required_gradients(frozen: str) -> None:
    run_ranks(1, _freeze, frozen)
