"""The divergence of an exit from the final exit against torch and values worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from ee_llm.losses.distillation import (
    Distillation,
    vocab_parallel_argmax,
    vocab_parallel_divergence,
)
from ee_llm.losses.exit_losses import exit_loss

LENGTH, BATCH, VOCAB = 5, 2, 11


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(LENGTH, BATCH, VOCAB, generator=generator, dtype=dtype)).detach()


def test_divergence_of_two_tokens_worked_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)."""
    teacher = torch.tensor([[[math.log(3.0), 0.0]]], dtype=torch.float64)
    student = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    loss = vocab_parallel_divergence(student, teacher)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-12)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0.5 - 0.75, 0.5 - 0.25])


def test_temperature_divides_logits_and_scales_by_its_square() -> None:
    """At T = 2, logits (2 ln 3, 0) give p = (3/4, 1/4); the factor is 4."""
    teacher = torch.tensor([[[2 * math.log(3.0), 0.0]]], dtype=torch.float64)
    loss = vocab_parallel_divergence(torch.zeros_like(teacher), teacher, 2.0)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_divergence_and_gradient_equal_torch(temperature: float) -> None:
    teacher = random_logits(0)
    ours, plain = (random_logits(1).requires_grad_() for _ in range(2))
    weights = random_logits(2)[..., 0]
    loss = vocab_parallel_divergence(ours, teacher, temperature)
    q, p = (F.log_softmax(x / temperature, dim=-1) for x in (plain, teacher))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * temperature**2
    torch.testing.assert_close(loss, expected)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_divergence_of_bfloat16_is_computed_in_float32() -> None:
    teacher, logits = random_logits(0, torch.bfloat16), random_logits(1, torch.bfloat16)
    logits.requires_grad_()
    loss = vocab_parallel_divergence(logits, teacher)
    exact = vocab_parallel_divergence(logits.detach().double(), teacher.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    teacher = torch.tensor([[[1e4, -1e4, 0.0]]])
    student = torch.tensor([[[-1e4, 1e4, 0.0]]], requires_grad=True)
    loss = vocab_parallel_divergence(student, teacher)
    assert loss.item() == pytest.approx(2e4)
    loss.sum().backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == [-1.0, 1.0, 0.0]


def test_a_second_derivative_is_refused() -> None:
    student = random_logits(1).requires_grad_()
    loss = vocab_parallel_divergence(student, random_logits(0))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss.sum(), student, create_graph=True)


@pytest.mark.parametrize("adds_labels", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_objectives_of_an_exit(adds_labels: bool, dynamic: bool) -> None:
    teacher, logits = random_logits(0), random_logits(1)
    labels = torch.arange(LENGTH * BATCH).view(LENGTH, BATCH) % VOCAB
    mask = torch.ones(LENGTH, BATCH)
    mask[2, 1] = 0
    found = exit_loss(
        logits,
        labels,
        mask,
        dynamic_token_weights=dynamic,
        distillation=Distillation(teacher, 2.0, adds_labels),
    )
    tokens = vocab_parallel_divergence(logits, teacher, 2.0)
    if adds_labels:
        tokens = tokens + F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        ).view(LENGTH, BATCH)
    torch.testing.assert_close(found.reported, (tokens * mask).sum())
    # The exit's own probabilities, without the temperature of the divergence.
    factor = logits.softmax(-1).amax(-1) if dynamic else torch.ones_like(tokens)
    torch.testing.assert_close(found.objective, (tokens * mask * factor).sum())


def test_argmax_is_the_lowest_of_equals() -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0]], [[3.0, 1.0, 3.0]]])
    assert vocab_parallel_argmax(logits).tolist() == [[1], [0]]
