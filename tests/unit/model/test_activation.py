"""Our gated activation equals the plain formula, forward and backward."""

import torch

from ee_llm.model.activation import SwiGlu


def plain(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def test_swiglu_equals_the_formula_and_its_gradient():
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(5, 2, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(5, 2, 6, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad((plain(both) * weight).sum(), both)
    (found,) = torch.autograd.grad((SwiGlu()(both) * weight).sum(), both)
    assert torch.equal(SwiGlu()(both), plain(both))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_swiglu_keeps_its_input_and_the_activated_gate_alone():
    kept: list[torch.Tensor] = []
    both = torch.randn(5, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        SwiGlu()(both)
    assert [tuple(tensor.shape) for tensor in kept] == [(5, 12), (5, 6)]
