"""Weight gradients that are put off: equal to autograd's, and not there before they are wanted."""

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


def test_without_putting_off_it_is_a_linear_layer():
    hidden, weight, upstream = tensors()
    output = WeightGradients().linear(hidden, weight)
    assert torch.equal(output, torch.nn.functional.linear(hidden, weight))
    output.backward(upstream)
    for found, wanted in zip((hidden.grad, weight.grad), expected(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_put_off_gradients_come_when_called_and_are_added():
    hidden, weight, upstream = tensors()
    later = WeightGradients()
    outputs = [later.linear(hidden, weight) for _ in range(2)]
    calls = []
    for output in outputs:
        with later.defer() as add_weights:
            output.backward(upstream)
        calls.append(add_weights)
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, 2 * expected()[0])
    for number, call in enumerate(reversed(calls), start=1):
        call()
        torch.testing.assert_close(weight.grad, number * expected()[1], rtol=1e-13, atol=1e-13)
    later.linear(hidden, weight).backward(upstream)  # nothing is put off any more
    torch.testing.assert_close(weight.grad, 3 * expected()[1], rtol=1e-13, atol=1e-13)


def test_a_buffer_of_wider_type_is_what_is_added_to():
    hidden, weight, upstream = tensors(torch.bfloat16)
    weight.main_grad = torch.ones(5, 4)
    later = WeightGradients()
    output = later.linear(hidden, weight)
    with later.defer() as add_weights:
        output.backward(upstream)
    add_weights()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 1 + expected()[1].float(), rtol=0.02, atol=0.02)


def test_a_frozen_weight_is_left_alone_and_the_rest_of_the_graph_let_go():
    hidden, weight, upstream = tensors()
    frozen = weight.detach()
    later = WeightGradients()
    inner = torch.tanh(hidden)
    output = later.linear(later.linear(inner, frozen).relu(), torch.eye(5, dtype=torch.float64))
    graph = weakref.ref(output)
    with later.defer() as add_weights:
        output.backward(upstream)
    del output
    assert graph() is None
    add_weights()
    assert frozen.grad is None
    assert hidden.grad is not None
