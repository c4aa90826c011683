"""Cross entropy, exit losses and weight schedules; tests/distributed has the sharded versions."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ee_llm.losses.exit_losses import exit_loss, scheduled_weight, vocab_parallel_cross_entropy

LENGTH, BATCH, VOCAB = 5, 3, 17
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def make_logits(dtype, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LENGTH, BATCH, VOCAB, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, VOCAB, (LENGTH, BATCH), generator=generator)
    return logits.to(dtype).requires_grad_(), labels


def reference(logits, labels, weights):
    """Return torch's loss, gradient and top probability in float64 for the same numbers."""
    wide = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
    loss = loss.view(LENGTH, BATCH)
    (loss * weights).sum().backward()
    return loss.detach(), wide.grad, wide.detach().softmax(-1).amax(-1)


@pytest.mark.parametrize("scale", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_torch(dtype, scale):
    logits, labels = make_logits(dtype, scale)
    weights = torch.linspace(-1, 2, LENGTH * BATCH, dtype=torch.float64).view(LENGTH, BATCH)
    loss, gradient, top = reference(logits, labels, weights)
    actual = vocab_parallel_cross_entropy(logits, labels)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert actual.loss.dtype == actual.top_probability.dtype == wide
    (actual.loss * weights).sum().backward()
    assert logits.grad.dtype == dtype
    # Only the returned gradient is rounded to bfloat16; the loss is computed in float32.
    forward = TOLERANCE[wide]
    torch.testing.assert_close(actual.loss.double(), loss, rtol=forward, atol=forward)
    torch.testing.assert_close(actual.top_probability.double(), top, rtol=forward, atol=forward)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=tolerance, atol=tolerance / 10)
    assert not actual.top_probability.requires_grad


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_logits_stay_finite(dtype):
    """Guards the subtraction of the maximum: exp overflows float32 at 89."""
    rows = [[3e4, -3e4, 0.0], [-1e4, -1e4, -1e4], [1e30, 1e30, -1e30], [0.0, -math.inf, 1.0]]
    logits = torch.tensor(rows, dtype=torch.float64).to(dtype).unsqueeze(1).requires_grad_()
    labels = torch.tensor([[0], [2], [1], [2]])
    loss, top = vocab_parallel_cross_entropy(logits, labels)
    loss.sum().backward()
    expected = [0.0, math.log(3), math.log(2), math.log(1 + math.exp(-1))]
    assert loss.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert top.flatten().tolist() == pytest.approx([math.exp(-x) for x in expected], rel=1e-6)
    assert logits.grad.isfinite().all()
    gradient = logits.grad.squeeze(1).double()
    assert gradient.sum(-1).tolist() == pytest.approx([0.0] * 4, abs=1e-2)
    assert gradient[2].tolist() == pytest.approx([0.5, -0.5, 0.0], abs=1e-6)


def test_label_of_tiny_probability_has_its_exact_loss():
    logits = torch.tensor([[[200.0, 0.0]]], requires_grad=True)
    loss, _ = vocab_parallel_cross_entropy(logits, torch.tensor([[1]]))
    loss.sum().backward()
    assert loss.item() == 200.0
    assert logits.grad.flatten().tolist() == [1.0, -1.0]


def test_logits_are_not_modified():
    logits, labels = make_logits(torch.float32)
    before = logits.detach().clone()
    vocab_parallel_cross_entropy(logits, labels).loss.sum().backward()
    assert torch.equal(logits.detach(), before)


def test_labels_may_be_a_transposed_view():
    logits, labels = make_logits(torch.float64)
    expected = vocab_parallel_cross_entropy(logits, labels).loss
    view = labels.t().contiguous().t()
    assert not view.is_contiguous()
    assert torch.equal(vocab_parallel_cross_entropy(logits, view).loss, expected)


def test_second_backward_raises():
    """The first one overwrites the probabilities, so a second one would be silently wrong."""
    logits, labels = make_logits(torch.float64)
    loss = vocab_parallel_cross_entropy(logits, labels).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_raises():
    logits, labels = make_logits(torch.float64)
    loss = vocab_parallel_cross_entropy(logits, labels).loss.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_exit_loss_sums_valid_tokens():
    logits, labels = make_logits(torch.float64)
    mask = torch.zeros(LENGTH, BATCH)
    mask[1, 2] = mask[4, 0] = 1
    token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    token = token.view(LENGTH, BATCH).detach()
    loss = exit_loss(logits, labels, mask)
    assert loss.objective.item() == pytest.approx((token[1, 2] + token[4, 0]).item(), rel=1e-12)
    assert loss.reported.item() == loss.objective.item()
    assert not loss.reported.requires_grad
    loss.objective.backward()
    used = logits.grad.abs().sum(-1) > 0
    assert torch.equal(used, mask.bool())


def test_microbatch_without_valid_tokens_has_no_loss_and_no_gradient():
    logits, labels = make_logits(torch.float32)
    loss = exit_loss(logits, labels, torch.zeros(LENGTH, BATCH), dynamic_token_weights=True)
    loss.objective.backward()
    assert loss.objective.item() == loss.reported.item() == 0
    assert not logits.grad.any()


def test_dynamic_token_weights_multiply_by_the_detached_top_probability():
    logits, labels = make_logits(torch.float64)
    mask = torch.ones(LENGTH, BATCH)
    mask[0] = 0
    plain = logits.detach().clone().requires_grad_()
    top = plain.detach().softmax(-1).amax(-1)
    token = -plain.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = (token * top * mask).sum()
    expected.backward()
    loss = exit_loss(logits, labels, mask, dynamic_token_weights=True)
    loss.objective.backward()
    torch.testing.assert_close(loss.objective, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.reported, (token * mask).sum().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("schedule", "initial", "final", "expected"),
    [
        # At steps 0, 25, 50, 75, 100 (the end) and 130.
        ("constant", 0.0, 0.6, [0.6, 0.6, 0.6, 0.6, 0.6, 0.6]),
        ("linear", 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ("linear", 1.0, 0.2, [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", 0.0, 1.0, [0.0, 0.1464466094, 0.5, 0.8535533906, 1.0, 1.0]),
        ("cosine", 1.0, 0.0, [1.0, 0.8535533906, 0.5, 0.1464466094, 0.0, 0.0]),
    ],
)
def test_scheduled_weight(schedule, initial, final, expected):
    steps = (0, 25, 50, 75, 100, 130)
    weights = [scheduled_weight(schedule, initial, final, 100, step) for step in steps]
    assert weights == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_is_monotonic_and_ends_exactly(schedule):
    weights = [scheduled_weight(schedule, 0.1, 0.7, 1000, step) for step in range(1001)]
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(0.1)
    assert weights[-1] == 0.7
    assert max(b - a for a, b in pairwise(weights)) < 0.002
