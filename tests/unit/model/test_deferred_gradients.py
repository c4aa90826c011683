"""Deferred weight gradients: equal to those of autograd, and computed only when called."""

import weakref

import torch

from ee_llm.model.deferred_gradients import WeightGradients


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype)
    upstream = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), upstream


def expected():
    hidden, weight, upstream = tensors()
    torch.nn.functional.linear(hidden, weight).backward(upstream)
    return hidden.grad, weight.grad


def test_equals_a_linear_layer_without_deferral():
    hidden, weight, upstream = tensors()
    output = WeightGradients().linear(hidden, weight)
    assert torch.equal(output, torch.nn.functional.linear(hidden, weight))
    output.backward(upstream)
    for actual, reference in zip((hidden.grad, weight.grad), expected(), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-14, atol=1e-14)


def test_deferred_gradients_are_accumulated_when_called():
    hidden, weight, upstream = tensors()
    gradients = WeightGradients()
    outputs = [gradients.linear(hidden, weight) for _ in range(2)]
    calls = []
    for output in outputs:
        with gradients.defer() as add_weights:
            output.backward(upstream)
        calls.append(add_weights)
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, 2 * expected()[0])
    for number, call in enumerate(reversed(calls), start=1):
        call()
        torch.testing.assert_close(weight.grad, number * expected()[1], rtol=1e-13, atol=1e-13)
    gradients.linear(hidden, weight).backward(upstream)  # No longer deferred.
    torch.testing.assert_close(weight.grad, 3 * expected()[1], rtol=1e-13, atol=1e-13)


def test_gradients_accumulate_in_main_grad_of_a_wider_type():
    hidden, weight, upstream = tensors(torch.bfloat16)
    weight.main_grad = torch.ones(5, 4)
    gradients = WeightGradients()
    output = gradients.linear(hidden, weight)
    with gradients.defer() as add_weights:
        output.backward(upstream)
    add_weights()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + expected()[1].float(), rtol=0.02, atol=0.02)


def test_frozen_weight_has_no_gradient_and_the_graph_is_freed():
    hidden, weight, upstream = tensors()
    frozen = weight.detach()
    gradients = WeightGradients()
    inner = torch.tanh(hidden)
    output = gradients.linear(
        gradients.linear(inner, frozen).relu(), torch.eye(5, dtype=torch.float64)
    )
    graph = weakref.ref(output)
    with gradients.defer() as add_weights:
        output.backward(upstream)
    del output
    assert graph() is None
    add_weights()
    assert frozen.grad is None
    assert hidden.grad is not None
